"""What can be judged: merges, and adapters and models on disk."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.calibration.load import load_model
from mergekit_tspa.calibration.readings import Readings
from mergekit_tspa.calibration.singles import Singles
from mergekit_tspa.errors import InputError
from mergekit_tspa.merging.api import MergedAdapters, merge_adapters
from mergekit_tspa.merging.finish import finish
from mergekit_tspa.merging.merge import CHUNK_BYTES, Device, merge_chunks
from mergekit_tspa.merging.plan import MergePlan
from mergekit_tspa.methods.inputs import Progress, silent
from mergekit_tspa.scoring.judge import Judge, Judged
from mergekit_tspa.scoring.placement import MergedPart, Placement, place


@dataclass(frozen=True)
class Candidate:
    """A merge that is to be judged."""

    name: str
    kind: str  # what it is: plain sum, recipe, adapter, model
    judge: Callable[[Judge], tuple[Judged, int | None]]  # and its rank, if it is one adapter's


def merged_parts(
    plan: MergePlan, device: Device = None, progress: Progress = silent, readings: Readings | None = None
) -> Iterator[MergedPart]:
    """Every part that a merge changes, chunk by chunk.

    Args:
        readings: of the plan's texts, if they were begun already

    Raises:
        InputError: the merge moves layers, or what the method refuses.
    """
    check_unmoved(plan)
    where: dict[str, list[tuple[str, Any]]] = {}
    for output in plan.changed.values():
        for part in output.parts:
            where.setdefault(part.plan.name, []).append((output.base, part))
    chunks = [*plan.chunks(CHUNK_BYTES)]
    for done, (updates, _) in enumerate(merge_chunks(plan, chunks, device, progress, readings), start=1):
        progress("merging", done / len(chunks))  # a rule says nothing of a chunk that is one tensor
        for name, update in updates.items():
            for base, part in where[name]:
                yield MergedPart(base, part.index, name, finish(part.plan, update))
    for parts in where.values():
        for base, part in parts:
            if not part.plan.sources:  # trained directly
                yield MergedPart(base, part.index, part.plan.name, finish(part.plan, None))


def check_unmoved(plan: MergePlan) -> None:
    """
    Raises:
        InputError: slices move layers, so that the merge is no change of the base.
    """
    if moved := next((output for output in plan.changed.values() if output.name != output.base), None):
        raise InputError(
            f"{moved.name}: it is {moved.base} of the base, and merges are judged in the base as it is; "
            "leave out slices that move layers, or merge to a model and name its directory"
        )


def rank_of(placement: Placement) -> int | None:
    """The rank of an adapter that holds the merge, or None if none does."""
    if placement.values:
        return None
    return max((update.rank for update in placement.beside.values()), default=0)


def planned(
    name: str, kind: str, plan: MergePlan, device: Device = None, progress: Progress = silent
) -> Candidate:
    """A merge that is made when it is judged."""

    def judge(by: Judge) -> tuple[Judged, int | None]:
        placement = place(by.singles, merged_parts(plan, device, progress))
        return by.merged(name, placement), rank_of(placement)

    return Candidate(name, kind, judge)


def made(name: str, merged: MergedAdapters, kind: str = "merge") -> Candidate:
    """A merge that `merge_adapters` made.

    Raises:
        InputError: the updates are a copy that has lost its merge.
    """
    plan = merged.plan
    if plan is None:
        raise InputError(
            f"{name}: these updates are a copy, which has lost its merge; score the merge itself"
        )

    def parts() -> Iterable[MergedPart]:
        for output in plan.changed.values():
            for part in output.parts:
                module = part.plan.name.removesuffix(".weight")
                if module in merged:
                    yield MergedPart(output.base, part.index, part.plan.name, merged[module])

    def judge(by: Judge) -> tuple[Judged, int | None]:
        placement = place(by.singles, parts())
        return by.merged(name, placement), rank_of(placement)

    return Candidate(name, kind, judge)


def stored(name: str, path: Path, base: Path) -> Candidate:
    """An adapter or a whole model on disk.

    Args:
        name: of the candidate
        path: its directory
        base: of the adapter

    Raises:
        InputError: it is neither.
    """
    if (path / "config.json").is_file():
        return Candidate(name, "model", lambda by: (_judge_model(by, name, path), None))
    if (path / "adapter_config.json").is_file():

        def judge(by: Judge) -> tuple[Judged, int | None]:
            merged = merge_adapters("lora_task_arithmetic", [path], base=base)
            return made(name, merged).judge(by)

        return Candidate(name, "adapter", judge)
    raise InputError(f"{path}: holds neither a model (config.json) nor an adapter (adapter_config.json)")


def _judge_model(by: Judge, name: str, path: Path) -> Judged:
    parameter = next(by.singles.model.parameters())
    model = load_model(path, parameter.dtype, device=by.singles.device)
    theirs, ours = (one.get_input_embeddings().weight.shape for one in (model, by.singles.model))
    if theirs[1] != ours[1] or theirs[0] < ours[0]:
        raise InputError(
            f"{path}: its embeddings are {tuple(theirs)} and those of the base {tuple(ours)}; score a model "
            "of the same base"
        )
    singles = Singles(model, ModelTensors.of(str(path), Checkpoint(path)), [])
    return by.judge(name, singles, nullcontext)
