"""What a merge does to each tensor of its output."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mergekit_tspa.adapters import Adapter, Change, LoraModule
from mergekit_tspa.base.tensors import Index
from mergekit_tspa.methods.inputs import Planned


class TensorPlan(NamedTuple):
    """One tensor to merge, or one expert of a fused one."""

    name: str
    sources: Sequence[tuple[Adapter, str]]  # the adapter and its module
    weights: Sequence[float]  # a_t of each source, never 0
    parameters: Any  # of the method's class
    changes: Sequence[tuple[Change, float]] = ()  # of adapters that trained it directly, and their weights

    @property
    def modules(self) -> list[LoraModule]:
        return [adapter.modules[module] for adapter, module in self.sources]

    @property
    def ranks(self) -> list[int]:
        return [module.rank for module in self.modules]

    @property
    def shape(self) -> tuple[int, int]:
        return self.modules[0].shape

    @property
    def planned(self) -> Planned:
        """What the method may know of it by now."""
        return Planned(self.name, self.shape, self.ranks, self.parameters)

    @property
    def nbytes(self) -> int:
        """Size of its factors in float32."""
        return sum(4 * module.rank * sum(module.shape) for module in self.modules)

    @property
    def is_dora(self) -> bool:
        return any(module.magnitude is not None for module in self.modules)


class Part(NamedTuple):
    """What is merged into a tensor of the output, or into a part of it, such as one expert."""

    index: Index  # type: ignore[assignment]  # a tuple has a method of that name
    plan: TensorPlan


class OutputTensor(NamedTuple):
    """A tensor of the merged model: one of the base, with its parts merged."""

    name: str
    base: str  # the base's tensor
    parts: tuple[Part, ...] = ()  # none: it stays as it is


class Wanted(NamedTuple):
    """What a recipe or a call asks for one tensor of the output, or one expert in it; weights may still be
    0.
    """

    output: str
    base: str
    name: str  # of the part; that of the output if it is all of it
    index: Index  # type: ignore[assignment]  # a tuple has a method of that name
    sources: Sequence[tuple[Adapter, str, float]]  # adapter, module, weight
    changes: Sequence[tuple[Adapter, Change, float]]
    parameters: Any  # of the method's class
