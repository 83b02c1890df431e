"""Rebuild the model of one task from an EMR merge: base, mask and scale."""

import shutil
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError
from tqdm import tqdm

from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.files import read_json
from mergekit_tspa.errors import InputError
from mergekit_tspa.methods.emr_records import DESCRIPTION, RECORDS, task_update
from mergekit_tspa.plugin.compat import LazyTensorLoader, ModelReference, ShardedTensorIndex, TensorWriter
from mergekit_tspa.plugin.output import replaced

_WEIGHTS = (".safetensors", ".bin", ".index.json")


class _Weight(BaseModel):
    """A tensor that tasks changed."""

    base: str  # its name there
    tasks: list[str]


class _Description(BaseModel):
    """What an EMR merge says of itself."""

    base_model: str
    weights: dict[str, _Weight]


@torch.no_grad()
def rebuild(merged: Path, task: str, out: Path, quiet: bool = False) -> None:
    """Write `base + uni * mask * scale` of one task of an EMR merge, in the precision of the unified model.

    Args:
        merged: what the merge wrote
        task: an adapter of the recipe, by its path or the last part of it

    Raises:
        InputError: not an EMR merge, an unknown task, or `out` is there already.
    """
    if not (merged / DESCRIPTION).is_file():
        raise InputError(
            f"{merged}: no {DESCRIPTION} there; give the output directory of a merge with an emr method"
        )
    if not (merged / "config.json").is_file():
        raise InputError(f"{merged}: no config.json there; the merge did not finish, run it again")
    description = _described(merged / DESCRIPTION)
    weights = description.weights
    chosen = _find(task, {name for weight in weights.values() for name in weight.tasks})
    if out.exists():
        raise InputError(f"{out}: is there already; name another directory with --out")
    records = Checkpoint(merged, (RECORDS,))
    Checkpoint(merged).shapes()  # refuses damaged files
    base_model = description.base_model
    try:
        base = ModelReference.parse(base_model).lazy_loader(lazy_unpickle=False)
    except Exception as error:  # not there, not reachable, not a model: all need the same way out
        raise InputError(
            f"{base_model}: the base of {merged} cannot be read ({error}); put it there again"
        ) from error
    unified = LazyTensorLoader(ShardedTensorIndex.from_disk(str(merged)), lazy_unpickle=False)
    with replaced(out) as partial, TensorWriter(str(partial)) as writer:
        ignored = lambda _, names: [n for n in names if n.endswith(_WEIGHTS) or n == DESCRIPTION]  # noqa: E731
        shutil.copytree(merged, partial, ignore=ignored, dirs_exist_ok=True)
        for name in tqdm(unified.index.tensor_paths, desc=f"rebuilding {task}", disable=quiet):
            tensor = _tensor(unified, name)
            if name in weights:
                before = _tensor(base, weights[name].base)
                if before.shape != tensor.shape:
                    raise InputError(
                        f"{base_model}: {weights[name].base} has shape {tuple(before.shape)}, but {name} of "
                        f"{merged} has {tuple(tensor.shape)}; put the base of the merge there again"
                    )
                position = _position(records, name, weights[name].tasks, chosen)
                update = None if position is None else task_update(_record(records, name), position)
                tensor = (before if update is None else update.apply_to(before)).to(tensor.dtype)
            writer.save_tensor(name, tensor)


def _described(file: Path) -> _Description:
    """
    Raises:
        InputError: it is damaged.
    """
    try:
        return _Description.model_validate(read_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{file}: {where}: {first['msg']}; run the merge again") from error


def _tensor(loader: LazyTensorLoader, name: str) -> torch.Tensor:
    """
    Raises:
        InputError: there is no such tensor.
    """
    tensor = loader.get_tensor(name)
    if tensor is None:
        raise InputError(f"{loader.index.base_path}: there is no {name}; put the model there again")
    return tensor


def _find(task: str, known: set[str]) -> str:
    found = [name for name in known if task in (name, Path(name).name)]
    if len(found) != 1:
        raise InputError(
            f"{task}: {'several tasks are' if found else 'no task is'} called so; {', '.join(sorted(known))}"
        )
    return found[0]


def _position(records: Checkpoint, weight: str, tasks: list[str], chosen: str) -> int | None:
    """Which mask of a weight is the task's; None where its adapter changes nothing."""
    if chosen not in tasks or f"{weight}.tasks" not in records:
        return None
    kept = records[f"{weight}.tasks"].tolist()
    return kept.index(tasks.index(chosen)) if tasks.index(chosen) in kept else None


def _record(records: Checkpoint, weight: str) -> dict[str, torch.Tensor]:
    keys = ("unified", "largest", "mask", "scale", "U", "V")
    found = {key: records[f"{weight}.{key}"] for key in keys if f"{weight}.{key}" in records}
    if missing := [key for key in keys[:4] if key not in found]:
        raise InputError(
            f"{records.directory / RECORDS}: it lacks {missing[0]} of {weight}; run the merge again"
        )
    return found
