"""The tasks of a merge: solve a chunk of weights, take one update of it, apply it to the base tensor."""

from dataclasses import dataclass

import torch
from mergekit.common import dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import LoadTensor
from pydantic import ConfigDict

from mergekit_tspa.methods import Dense, LowRank, Method
from mergekit_tspa.methods.base import WeightPlan, merge_weights


@dataclass(frozen=True, eq=False)
class Chunk:
    """Weights that are merged together; two chunks are equal only if they are the same object."""

    method: Method
    plans: list[WeightPlan]
    label: str  # of the first base tensor it is needed for


class MergeChunk(Task[list[tuple[torch.Tensor, ...]]], frozen=True):
    """Merge the adapters of many weights at once; the factors are in memory already."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    chunk: Chunk
    device: str | None  # None: the thread's default device, as mergekit's multi-GPU executor sets it

    def arguments(self) -> dict[str, Task]:
        return {}

    def group_label(self) -> str:
        return self.chunk.label

    def execute(self) -> list[tuple[torch.Tensor, ...]]:
        device = self.device or torch.get_default_device()
        return [tuple(update) for update in merge_weights(self.chunk.method, self.chunk.plans, device)]


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


class ApplyUpdate(Task[torch.Tensor], frozen=True):
    """`W + dW` in the precision of the update, rounded once."""

    base: LoadTensor
    update: TakeUpdate
    dtype: str | None  # of the result; the base's by default

    def arguments(self) -> dict[str, Task]:
        return {"W": self.base, "update": self.update}

    def group_label(self) -> str | None:
        return self.base.group_label()

    def uses_accelerator(self) -> bool:
        return True

    def execute(self, W: torch.Tensor, update: tuple[torch.Tensor, ...]) -> torch.Tensor:
        merged = LowRank(*update) if len(update) == 2 else Dense(*update)
        with torch.no_grad():
            return merged.apply_to(W).to(dtype_from_name(self.dtype) or W.dtype)
