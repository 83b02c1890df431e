"""A planned merge as tasks of mergekit's graph: Grams of base tensors, chunks to merge, updates to apply."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from mergekit_tspa.adapters import Adapter
from mergekit_tspa.alignment.attention import SideGrams
from mergekit_tspa.merging.finish import finish_tensor
from mergekit_tspa.merging.merge import log_merge, merge_chunk, record_tensor, survey_plan
from mergekit_tspa.merging.outputs import OutputTensor, TensorPlan
from mergekit_tspa.merging.pair_plans import load_side
from mergekit_tspa.merging.plan import Chunk, MergePlan
from mergekit_tspa.methods.inputs import PairPlan, PairSide, Survey
from mergekit_tspa.methods.report import Report, Truncation
from mergekit_tspa.plugin.compat import LoadTensor, Task, TensorWriter, TensorWriterTask, dtype_from_name
from mergekit_tspa.plugin.output import clear_earlier
from mergekit_tspa.progress import Bar
from mergekit_tspa.updates import Dense, LowRank

# The fields of an update by their names.  The executor moves the tensors of dictionaries between devices, but
# turns named tuples into plain ones.
UpdateFields = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Work:
    """What a task is about; two are equal only if they are the same object."""

    plan: MergePlan
    chunk: Chunk
    label: str  # when to run it, in the order of the base tensors' labels


@dataclass(frozen=True, eq=False)
class SideSource:
    """What a side's Grams are made of."""

    plan: MergePlan
    pair: PairPlan
    side: PairSide
    label: str


class LoadBase(LoadTensor, Task[torch.Tensor], frozen=True):
    """A tensor of the base; mergekit's `LoadTensor` may give none, so its plans in memory do not take that
    one.
    """


class LoadSide(Task[tuple[torch.Tensor, ...]], frozen=True, arbitrary_types_allowed=True):
    """Read the base tensor of one side of an attention pair and keep its Grams."""

    source: SideSource
    device: str | None

    def arguments(self) -> dict[str, Task]:
        return {}

    def group_label(self) -> str:
        return self.source.label

    def execute(self) -> tuple[torch.Tensor, ...]:
        # The tensor is read here, not through an argument, which the executor would keep until it is written.
        source = self.source
        assert source.plan.read is not None
        with on_device(self.device) as device:
            return tuple(load_side(source.pair, source.side, source.plan.read, device))


class SurveyModel(Task[dict], frozen=True, arbitrary_types_allowed=True):
    """What a method knows of all tensors beforehand: statistics of the adapters, or what texts say."""

    work: Work  # of all tensors
    device: str | None
    quiet: bool

    def arguments(self) -> dict[str, Task]:
        return {}

    def group_label(self) -> str:
        return self.work.label

    def uses_accelerator(self) -> bool:
        return True

    def execute(self) -> dict:
        with on_device(self.device) as device, Bar(self.quiet) as bar:
            return dict(survey_plan(self.work.plan, device, bar.update) or {})


class MergeChunk(Task[dict], frozen=True, arbitrary_types_allowed=True):
    """Merge the adapters of many tensors at once; their factors are in memory already."""

    work: Work
    sides: tuple[LoadSide, ...]  # of each pair x, y
    survey: SurveyModel | None
    device: str | None
    quiet: bool

    def arguments(self) -> dict[str, Task]:
        sides = {str(i): side for i, side in enumerate(self.sides)}
        return sides | ({"survey": self.survey} if self.survey else {})

    def group_label(self) -> str:
        return self.work.label

    def uses_accelerator(self) -> bool:
        return True

    def execute(self, survey: Survey | None = None, **grams: tuple[torch.Tensor, ...]) -> dict:
        sides = [SideGrams(*grams[str(i)]) for i in range(len(self.sides))]
        with on_device(self.device) as device, Bar(self.quiet) as bar:
            updates, reports = merge_chunk(
                self.work.plan.method, self.work.chunk, sides, survey, device, bar.update
            )
        names = [tensor.name for tensor in self.work.chunk.tensors]
        return {
            "updates": {name: update._asdict() for name, update in zip(names, updates)},
            "reports": reports,
        }


class TakeUpdate(Task[UpdateFields], frozen=True):
    """One update of a chunk, so that only this one travels to the accelerator."""

    merge: MergeChunk
    tensor: str
    label: str

    def arguments(self) -> dict[str, Task]:
        return {"merged": self.merge}

    def group_label(self) -> str:
        return self.label

    def execute(self, merged: dict) -> UpdateFields:
        return merged["updates"][self.tensor]


class TakeReports(Task[list], frozen=True):
    """What the solvers of a chunk report, which outlives its updates."""

    merge: MergeChunk

    def arguments(self) -> dict[str, Task]:
        return {"merged": self.merge}

    def group_label(self) -> str:
        return self.merge.group_label()

    def execute(self, merged: dict) -> list[Report | Truncation]:
        return merged["reports"]


@dataclass(frozen=True, eq=False)
class Target:
    """The tensor that a task makes."""

    output: OutputTensor


class ApplyUpdates(Task[torch.Tensor], frozen=True, arbitrary_types_allowed=True):
    """The base's tensor with its parts updated in the precision of the updates, rounded once."""

    base: LoadTensor
    target: Target
    updates: tuple[TakeUpdate, ...]
    dtype: str | None  # of the result; the base's by default

    def arguments(self) -> dict[str, Task]:
        return {"W": self.base} | {str(i): update for i, update in enumerate(self.updates)}

    def group_label(self) -> str | None:
        return self.base.group_label()

    def uses_accelerator(self) -> bool:
        return True

    def execute(self, W: torch.Tensor, **updates: UpdateFields) -> torch.Tensor:
        merged = {update.tensor: update_of(updates[str(i)]) for i, update in enumerate(self.updates)}
        with on_device(None):
            return finish_tensor(self.target.output, W, merged, dtype_from_name(self.dtype))


class LogMerge(Task[None], frozen=True, arbitrary_types_allowed=True):
    """Once the merge is written, say what the solvers did, and what of updates and full models was left
    out.
    """

    finish: Task  # which writes the last of it
    reports: tuple[TakeReports, ...]
    adapters: tuple[Adapter, ...]

    def arguments(self) -> dict[str, Task]:
        return {"finished": self.finish} | {str(i): reports for i, reports in enumerate(self.reports)}

    def main_thread_only(self) -> bool:
        return True

    def execute(self, finished: None, **reports: list[Report | Truncation]) -> None:
        log_merge([report for i in range(len(self.reports)) for report in reports[str(i)]], self.adapters)


@dataclass(frozen=True, eq=False)
class EarlierWeights:
    """What lies in the directory of the output before the merge."""

    directory: Path
    files: dict[str, tuple[int, int]]


class ClearEarlier(Task[None], frozen=True, arbitrary_types_allowed=True):
    """Once the weights are written, take away those of an earlier merge that they did not replace."""

    finish: Task
    earlier: EarlierWeights

    def arguments(self) -> dict[str, Task]:
        return {"finished": self.finish}

    def main_thread_only(self) -> bool:
        return True

    def execute(self, finished: None) -> None:
        clear_earlier(self.earlier.directory, self.earlier.files)


@dataclass(frozen=True, eq=False)
class RecordSource:
    """The tensor that a record is made of."""

    plan: MergePlan
    tensor: TensorPlan


class SaveRecord(Task[None], frozen=True, arbitrary_types_allowed=True):
    """Write what the method keeps of a tensor beside the model, such as EMR's masks."""

    source: RecordSource
    label: str
    survey: SurveyModel | None
    writer: TensorWriterTask
    device: str | None

    def arguments(self) -> dict[str, Task]:
        return {"writer": self.writer} | ({"survey": self.survey} if self.survey else {})

    def group_label(self) -> str:
        return self.label

    def main_thread_only(self) -> bool:
        return True

    def execute(self, writer: TensorWriter, survey: Survey | None = None) -> None:
        tensor = self.source.tensor
        with on_device(self.device) as device:
            record = record_tensor(self.source.plan.method, tensor, survey, device)
        for key, value in record.items():
            writer.save_tensor(f"{tensor.name}.{key}", value.cpu())


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


def update_of(fields: UpdateFields) -> LowRank | Dense:
    """The update whose fields these are."""
    return LowRank(**fields) if "B" in fields else Dense(**fields)


@contextmanager
def on_device(device: str | None) -> Iterator[torch.device]:
    """Where a task computes, without gradients.  What names no device is made on the CPU, as it is outside of
    mergekit's multi-GPU executor.
    """
    found = device_of(device)
    # A device context costs microseconds at every call of torch, a second or two in a solver of 2000 steps.
    elsewhere = torch.get_default_device().type != "cpu"
    with torch.device("cpu") if elsewhere else nullcontext(), torch.no_grad():
        yield found


def device_of(device: str | None) -> torch.device:
    """None stands for the thread's default device, which mergekit's multi-GPU executor sets."""
    return torch.device(device) if device else torch.get_default_device()
