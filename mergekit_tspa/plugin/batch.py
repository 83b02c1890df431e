"""Every recipe of a directory, each merged to a directory of its own, here or on many machines.

`batch.json` beside the results says what came out of each recipe. It is also how the same command goes on
where it was stopped: a result counts as complete when it is there and this file has it with the same recipe.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_tspa.adapters.adapter_files import CONFIG_FILE
from mergekit_tspa.base.files import replaced
from mergekit_tspa.errors import InputError
from mergekit_tspa.jobs.pool import open_pool
from mergekit_tspa.plugin.adapter_output import merge_to_adapter
from mergekit_tspa.plugin.compat import MergeOptions, run_merge
from mergekit_tspa.plugin.output import held
from mergekit_tspa.plugin.recipe_file import read_recipe

RECORD = "batch.json"
_WRITTEN_LAST = {"adapter": CONFIG_FILE, "model": "config.json"}


@dataclass(frozen=True)
class Row:
    """What came out of one recipe.

    Args:
        result: what it is merged to, `adapter` or `model`
        error: why it failed
        seconds: that it took
        recipe: the SHA-256 of its file
    """

    name: str
    result: str
    error: str | None
    seconds: float | None
    recipe: str
    warnings: list[str] = field(default_factory=list)


class Job(NamedTuple):
    """One recipe to merge."""

    file: Path
    result: str
    out: Path


def merge_all(
    directory: Path, out: Path, options: MergeOptions, models: bool = False, ray: str | None = None
) -> Iterator[tuple[Row, bool]]:
    """Merge the recipes of a directory that are not merged yet. One that fails does not stop the others.

    Args:
        out: takes a directory for each recipe, named as its file is, and `batch.json`
        models: merge to models and not to adapters
        ray: as of `open_pool`. Each merge has as many cores as `options` names threads, one by default, and
            a GPU if its device is one.

    Yields:
        What came out of each recipe as soon as it is known, and whether it was there already.

    Raises:
        InputError: there are no recipes, two would have one output, or the outputs cannot be written.
    """
    files = recipes_in(directory)
    kind = "model" if models else "adapter"
    digests = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    with held(out):
        rows = {
            row.name: row
            for row in _read_record(out / RECORD, kind)
            if row.error is None
            and row.recipe == digests.get(row.name)
            and (out / row.name / _WRITTEN_LAST[kind]).exists()
        }
        yield from ((rows[name], True) for name in sorted(rows))
        left = {name: Job(file, kind, out / name) for name, file in files.items() if name not in rows}
        if not left:
            _write_record(out / RECORD, rows)
            return
        gpu = (options.device or "").startswith("cuda")
        if ray is not None:  # a worker has the threads of its cores and sees one GPU, if any
            one = {"num_threads": None, "quiet": True} | ({"device": "cuda"} if gpu else {})
            cpus, options = options.num_threads or 1, options.model_copy(update=one)
        else:
            cpus, options = 1, options.model_copy(update={"num_threads": None})  # they are set once
        with open_pool(_merge, partial(_prepare, options), ray=ray, cpus=cpus, gpus=int(gpu)) as pool:
            for name, job in left.items():
                pool.submit(name, job)
            for _ in left:
                name, warnings, error, seconds = pool.wait()
                rows[name] = Row(name, kind, error, seconds, digests[name], warnings or [])
                _write_record(out / RECORD, rows)
                yield rows[name], False


def recipes_in(directory: Path) -> dict[str, Path]:
    """The recipes of a directory by name.

    Raises:
        InputError: there are none, or two of one name.
    """
    found: dict[str, Path] = {}
    for file in sorted(directory.iterdir()):
        if file.suffix not in (".yml", ".yaml") or file.name.startswith(".") or not file.is_file():
            continue
        if file.stem in found:
            raise InputError(
                f"{directory}: {found[file.stem].name} and {file.name} would have one output; rename one"
            )
        found[file.stem] = file
    if not found:
        raise InputError(
            f"{directory}: holds no recipe, which is a file *.yml or *.yaml; name another directory"
        )
    return found


def _prepare(options: MergeOptions, _shared: Any) -> MergeOptions:
    return options


def _merge(options: MergeOptions, job: Job) -> list[str]:
    """Merge one recipe as its own command would, and give the warnings of the merge."""
    options.apply_global_options()  # which draws from the seed anew
    with _heard() as warnings:
        if job.result == "adapter":
            merge_to_adapter(job.file, options, job.out)
        elif (job.out / CONFIG_FILE).exists():
            raise InputError(
                f"{job.out}: holds an adapter, and transformers would apply it to the model beside it; name "
                "another directory"
            )
        else:
            config, source = read_recipe(job.file, foreign=True)
            run_merge(config, str(job.out), options, source)
    return warnings


@contextmanager
def _heard() -> Iterator[list[str]]:
    """The warnings of this package, which nobody sees on another machine."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("mergekit_tspa")
    logger.addHandler(handler)
    try:
        yield heard
    finally:
        logger.removeHandler(handler)


def _read_record(file: Path, kind: str) -> list[Row]:
    """
    Raises:
        InputError: something else is there, or what came out of recipes then is not of this kind.
    """
    try:
        rows = [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise InputError(f"{file}: was not written by this command; move it away") from error
    if rows and rows[0].result != kind:
        raise InputError(
            f"{file.parent}: takes {rows[0].result}s, of an earlier batch; name another directory"
        )
    return rows


def _write_record(file: Path, rows: dict[str, Row]) -> None:
    with replaced(file) as partial_file:
        content = [asdict(rows[name]) for name in sorted(rows)]
        partial_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
