"""The tasks of a merge: Grams of base weights, a chunk of weights to solve, one update of it, its base tensor."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tqdm
from mergekit.common import dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import LoadTensor, TensorWriterTask
from mergekit.io.tensor_writer import TensorWriter
from pydantic import ConfigDict

from mergekit_tspa.adapters import Adapter, log_kept
from mergekit_tspa.alignment.attention import SideGrams
from mergekit_tspa.base.tensors import Index
from mergekit_tspa.errors import InputError
from mergekit_tspa.linalg import finite
from mergekit_tspa.merging.finish import apply_parts
from mergekit_tspa.merging.merge import load_tensor, merge_tensors, survey_tensors
from mergekit_tspa.merging.pair_plans import load_side
from mergekit_tspa.merging.plan import TensorPlan
from mergekit_tspa.methods import Method
from mergekit_tspa.methods.inputs import Pair, PairPlan, PairSide
from mergekit_tspa.methods.report import Report, Truncation, summary
from mergekit_tspa.updates import Dense, LowRank

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Weights that are merged together; two chunks are equal only if they are the same object."""

    method: Method
    plans: list[TensorPlan]
    pairs: list[PairPlan]
    label: str  # when to run it, in the order of the base tensors' labels


@dataclass(frozen=True, eq=False)
class SideSource:
    """What a side's Grams are made of."""

    pair: PairPlan
    side: PairSide
    tensors: dict[str, LoadTensor]
    label: str


@dataclass(frozen=True, eq=False)
class Reports:
    """What the chunks of one merge report, to be said in a few lines at its end."""

    gathered: list[Report | Truncation] = field(default_factory=list)


class LoadSide(Task[tuple[torch.Tensor, ...]], frozen=True):
    """Read the base weight of one side of an attention pair and keep its Grams."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    source: SideSource
    device: str | None

    def arguments(self) -> dict[str, Task]:
        return {}

    def group_label(self) -> str:
        return self.source.label

    def execute(self) -> tuple[torch.Tensor, ...]:
        # The weight is read here, not through an argument, which the executor would keep until it is written.
        read = lambda name: self.source.tensors[name].execute()  # noqa: E731
        return tuple(load_side(self.source.pair, self.source.side, read, _device(self.device)))


class LoadBase(LoadTensor, Task[torch.Tensor], frozen=True):
    """A tensor of the base; mergekit's `LoadTensor` may give none, so its plans in memory do not take that one."""


class Survey(Task[dict], frozen=True):
    """Statistics of the adapters over all weights, for methods whose thresholds are those of the whole model."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    chunk: Chunk  # all weights
    device: str | None

    def arguments(self) -> dict[str, Task]:
        return {}

    def group_label(self) -> str:
        return self.chunk.label

    def uses_accelerator(self) -> bool:
        return True

    def execute(self) -> dict:
        with torch.no_grad():
            return dict(survey_tensors(self.chunk.method, self.chunk.plans, _device(self.device)))


class MergeChunk(Task[list[tuple[torch.Tensor, ...]]], frozen=True):
    """Merge the adapters of many weights at once; their factors are in memory already."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    chunk: Chunk
    sides: tuple[LoadSide, ...]  # of each pair x, y
    survey: Survey | None
    device: str | None
    quiet: bool
    reports: Reports

    def arguments(self) -> dict[str, Task]:
        sides = {str(i): side for i, side in enumerate(self.sides)}
        return sides | ({"survey": self.survey} if self.survey else {})

    def group_label(self) -> str:
        return self.chunk.label

    def uses_accelerator(self) -> bool:
        return True

    def execute(self, survey: dict | None = None, **grams: tuple[torch.Tensor, ...]) -> list[tuple[torch.Tensor, ...]]:
        sides = [SideGrams(*grams[str(i)]) for i in range(len(self.sides))]
        pairs = [Pair(*parts) for parts in zip(self.chunk.pairs, sides[::2], sides[1::2])]
        with torch.no_grad(), Bar(self.quiet) as bar:
            updates, reports = merge_tensors(
                self.chunk.method, self.chunk.plans, pairs, _device(self.device), bar.update, survey
            )
        self.reports.gathered.extend(reports)
        return [tuple(update) for update in updates]


class TakeUpdate(Task[tuple[torch.Tensor, ...]], frozen=True):
    """One update of a chunk, so that only this one travels to the accelerator."""

    merge: MergeChunk
    index: int
    label: str

    def arguments(self) -> dict[str, Task]:
        return {"updates": self.merge}

    def group_label(self) -> str:
        return self.label

    def execute(self, updates: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        return updates[self.index]


@dataclass(frozen=True, eq=False)
class Part:
    """What is done to a tensor, or to an expert of a fused one."""

    index: Index
    plan: TensorPlan
    update: TakeUpdate | None  # None: no adapter has factors for it


class ApplyUpdates(Task[torch.Tensor], frozen=True):
    """The base's tensor with its parts updated in the precision of the updates, rounded once."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    base: LoadTensor
    parts: tuple[Part, ...]
    dtype: str | None  # of the result; the base's by default

    def arguments(self) -> dict[str, Task]:
        return {"W": self.base} | {str(i): part.update for i, part in enumerate(self.parts) if part.update}

    def group_label(self) -> str | None:
        return self.base.group_label()

    def uses_accelerator(self) -> bool:
        return True

    def execute(self, W: torch.Tensor, **updates: tuple[torch.Tensor, ...]) -> torch.Tensor:
        parts = []
        for i, part in enumerate(self.parts):
            update = updates.get(str(i))
            update = update and (LowRank(*update) if len(update) == 2 else Dense(*update))
            parts.append((part.index, part.plan.finish(update)))
        dtype = dtype_from_name(self.dtype) or W.dtype
        with torch.no_grad():
            merged = apply_parts(W, parts, dtype)
        if not finite(merged):
            raise InputError(f"{self.base.tensor}: the merged weight holds NaN, or is too large for {dtype}")
        return merged


class LogMerge(Task[None], frozen=True):
    """Once the merge is written, say what the solvers did, and what of updates and full models was left out."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    finish: Task  # which writes the last of it
    reports: Reports
    full: tuple[Adapter, ...]

    def arguments(self) -> dict[str, Task]:
        return {"finished": self.finish}

    def main_thread_only(self) -> bool:
        return True

    def execute(self, finished: None) -> None:
        for report in summary(self.reports.gathered):
            LOG.log(logging.WARNING if isinstance(report, Truncation) else logging.INFO, "%s", report)
        for adapter in self.full:
            log_kept(adapter)


class SaveRecord(Task[None], frozen=True):
    """Write what the method keeps of a weight beside the model, such as EMR's masks."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    chunk: Chunk  # of one weight
    survey: Survey | None
    writer: TensorWriterTask
    device: str | None

    def arguments(self) -> dict[str, Task]:
        return {"writer": self.writer} | ({"survey": self.survey} if self.survey else {})

    def group_label(self) -> str:
        return self.chunk.label

    def main_thread_only(self) -> bool:
        return True

    def execute(self, writer: TensorWriter, survey: dict | None = None) -> None:
        (plan,) = self.chunk.plans
        with torch.no_grad():
            w = load_tensor(self.chunk.method, plan, _device(self.device))._replace(survey=survey)
            if not w.factors:
                return
            adapters = [adapter for adapter, _ in plan.sources]
            tasks = torch.tensor([adapters.index(adapter) for adapter in w.adapters])
            for key, tensor in {"tasks": tasks, **self.chunk.method.record(w)}.items():
                writer.save_tensor(f"{plan.name}.{key}", tensor.cpu())


class FinishRecords(Task[None], frozen=True):
    """Close the records and say in words what they belong to."""

    saved: tuple[SaveRecord, ...]
    writer: TensorWriterTask
    description: str  # JSON
    file: str

    def arguments(self) -> dict[str, Task]:
        return {"writer": self.writer} | {str(i): task for i, task in enumerate(self.saved)}

    def main_thread_only(self) -> bool:
        return True

    def execute(self, writer: TensorWriter, **_saved: None) -> None:
        writer.finalize()
        Path(writer.out_path, self.file).write_text(self.description, encoding="utf-8")


def _device(device: str | None) -> torch.device:
    """None stands for the thread's default device, which mergekit's multi-GPU executor sets."""
    return torch.device(device) if device else torch.get_default_device()


class Bar:
    """A progress bar per stage, beside mergekit's own that counts tasks."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self.stage: str | None = None
        self.bar: Any = None

    def __enter__(self) -> "Bar":
        return self

    def update(self, stage: str, done: float, left: float | None = None) -> None:
        if stage != self.stage:
            self.__exit__()
            self.stage = stage
            self.bar = tqdm.tqdm(
                desc=stage, total=100, leave=False, disable=self.quiet, bar_format="{l_bar}{bar}| {elapsed}{postfix}"
            )
        if left is not None:
            self.bar.set_postfix_str(f"{left:.3g} of the objective left", refresh=False)
        self.bar.update(100 * done - self.bar.n)

    def __exit__(self, *_error) -> None:
        if self.bar is not None:
            self.bar.close()
