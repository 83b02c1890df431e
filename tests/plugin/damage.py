"""Breaks the names that `compat` needs, one per process, without changing what mergekit itself does.

`python -m tests.plugin.damage MODEL MODEL OUT` loads mergekit without our hooks.  Then it forks for each
name: the child breaks it, installs the hooks, and runs a stock merge.  It prints one line of JSON per name:
the hash of the merged model, what was said, and whether mergekit knows our methods.
"""

import hashlib
import inspect
import json
import logging
import os
import sys
from enum import Enum
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mergekit_tspa
from mergekit_tspa import _startup

# Before mergekit is imported, so that nothing of it is extended yet; torch would install the hooks again.
if __name__ == "__main__":
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _startup._Finder)]

import mergekit.evo.genome
import mergekit.scripts.run_yaml
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.registry import registered_methods
from mergekit.options import MergeOptions

from mergekit_tspa.plugin import compat, hooks

# mergekit itself cannot do without a member of these.
BREAKABLE = [n for n in compat.NEEDED if not (inspect.isclass(n.find()) and issubclass(n.find(), Enum))]


def owners(needed: compat.Needed) -> tuple[list[object], str]:
    """The module, or the classes one above the other, that have it, and under which name."""
    path, _, name = needed.name.rpartition(".")
    place = import_module(needed.module)
    return [base for base in getattr(place, path).__mro__ if name in vars(base)] if path else [place], name


def function(needed: compat.Needed) -> Any:
    """What has the signature."""
    value = needed.find()
    return getattr(value, "__func__", value)


def break_(needed: compat.Needed) -> None:
    """Change what can be seen of it; mergekit works as before."""
    (place, *_), name = owners(needed)
    value = needed.find()
    if needed.takes is not None:
        another = inspect.Parameter("another", inspect.Parameter.KEYWORD_ONLY)
        function(needed).__signature__ = inspect.Signature([another])
    elif isinstance(value, dict):
        setattr(place, name, MappingProxyType(value))
    elif isinstance(value, str):
        setattr(place, name, value.replace("{base_text}", ""))
    elif needed.test is not None:
        setattr(place, name, type(name, (value,), {}))
    elif needed.has:
        fields = {a: base for base in value.__mro__ for a in inspect.get_annotations(base)}
        attribute = next(a for a in needed.has.split() if a in fields)
        del fields[attribute].__annotations__[attribute]
        if attribute in vars(fields[attribute]):  # the default of a dataclass, which it has copied
            delattr(fields[attribute], attribute)
    else:
        delattr(place, name)


def stock_merge(models: list[str], out: Path) -> str:
    """The hash of an average of two models, written by mergekit's own `linear`."""
    config = MergeConfiguration.model_validate(
        {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 0.5}} for m in models]}
    )
    mergekit.merge.run_merge(
        config, str(out), MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    )
    files = sorted(file for file in out.iterdir() if file.name in ("config.json", "model.safetensors"))
    assert len(files) == 2
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def outcome(needed: compat.Needed | None, install: bool, models: list[str], out: Path) -> dict:
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    hooks.LOG.addHandler(handler)
    if needed is not None:
        break_(needed)
    if install:
        mergekit_tspa.install()
    merged = stock_merge(models, out)
    hooks._ours("core_tsv")
    ours = any(method.spec.name == "core_tsv" for method in registered_methods())
    return {"merged": merged, "said": said, "ours": ours}


def main(models: list[str], folder: Path) -> None:
    cases = {"stock": (None, False), "whole": (None, True)}
    cases |= {f"{needed.module}.{needed.name}": (needed, True) for needed in BREAKABLE}
    for i, (name, (needed, install)) in enumerate(cases.items()):
        if child := os.fork():
            _, status = os.waitpid(child, 0)
            assert status == 0, name
        else:
            print(json.dumps([name, outcome(needed, install, models, folder / str(i))]), flush=True)
            os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:3], Path(sys.argv[3]))
