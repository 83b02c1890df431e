"""Post-import hooks on six mergekit modules; standard library only.

torch calls `install` at the end of `import torch` (entry-point group `torch.backends`), before mergekit's
merge methods are imported.  `install` puts one finder on `sys.meta_path`; when one of the modules below is
imported, its own loader runs first and `mergekit_tspa.plugin.hooks` extends the module afterwards, if this
mergekit is one that fits (`mergekit_tspa.plugin.compat`).  The loader object stays the original one, so
source look-up, reload and zip imports work as before.

`TORCH_DEVICE_BACKEND_AUTOLOAD=0` (torch's own switch) turns the entry point off.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_HOOKED = (
    "mergekit.config",
    "mergekit.merge_methods.registry",
    "mergekit.merge",
    "mergekit.plan",
    "mergekit.multigpu_executor",
    "mergekit.evo.genome",
)


def _extend(module: ModuleType) -> None:
    """Run the hook of a freshly imported module; a failing hook leaves stock mergekit as it is."""
    try:
        importlib.import_module("mergekit_tspa.plugin.hooks").extend(module)
    except Exception as error:
        warnings.warn(
            f"mergekit_tspa could not extend {module.__name__}: {error!r}", RuntimeWarning, stacklevel=2
        )


class _Finder:
    """Finds these modules through the other finders and extends each once it has been executed."""

    def __init__(self) -> None:
        self._searching: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _HOOKED or name in self._searching:
            return None
        self._searching.add(name)
        try:
            spec = find_spec(name)
        finally:
            self._searching.discard(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if module.__name__ == name:  # a zip importer is one loader for many modules
                _extend(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _Importing(ModuleType):
    """Class given to a module that is still being imported: extends it at its first use afterwards.

    `from mergekit.merge import run_merge` as a program's first line imports torch from inside
    `mergekit.merge`.
    """

    def __getattribute__(self, name: str) -> Any:
        get = super().__getattribute__
        if not get("__spec__")._initializing:
            self.__class__ = ModuleType  # type: ignore[assignment]
            _extend(self)
        return get(name)


def install() -> None:
    """Register the hooks; idempotent, never raises."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for module in filter(None, map(sys.modules.get, _HOOKED)):
        if getattr(module.__spec__, "_initializing", False):
            module.__class__ = _Importing
        else:
            _extend(module)
