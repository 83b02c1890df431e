"""A merge put into a model in memory, and taken out again bit for bit."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from mergekit_tspa.base.names import TensorNames
from mergekit_tspa.base.tensors import Index
from mergekit_tspa.calibration.layers import replaced_values
from mergekit_tspa.calibration.singles import Singles
from mergekit_tspa.errors import InputError
from mergekit_tspa.linalg import finite
from mergekit_tspa.merging.finish import MergedUpdate
from mergekit_tspa.updates import LoraFactors, LowRank


class MergedPart(NamedTuple):
    """What a merge makes of a tensor of the base, or of a part of it, such as one expert."""

    base: str  # the tensor
    index: Index  # type: ignore[assignment]  # a tuple has a method of that name
    name: str  # of the part
    update: MergedUpdate


@dataclass
class Placement:
    """A merge as the model is to have it: low-rank updates stand beside their layers, all else is "
    "replaced."""

    beside: dict[str, LoraFactors] = field(default_factory=dict)  # by tensor of the base
    values: dict[str, Tensor] = field(default_factory=dict)  # by parameter of the model


def place(singles: Singles, parts: Iterable[MergedPart]) -> Placement:
    """
    Args:
        singles: the model, and adapters that change every tensor that is merged
        parts: of the merge; of each only what is needed is kept

    Raises:
        InputError: a tensor is no parameter of the model in memory, or is not finite.
    """
    found, places = Placement(), _Places(singles)
    for part in parts:
        name = singles.base.own_name(part.name)
        if isinstance(part.update, LowRank) and name in singles.layers:
            found.beside[name] = part.update
            continue
        parameter, index = places.find(part)
        if parameter not in found.values:
            found.values[parameter] = places.parameters[parameter].detach().clone()
        W = found.values[parameter]
        merged = part.update.apply_to(W[index])
        if not finite(merged):
            raise InputError(f"{part.name}: the merged tensor holds NaN or is infinite")
        W[index] = merged.to(W)
    return found


@contextmanager
def placed(singles: Singles, placement: Placement) -> Iterator[None]:
    """While this lasts the model is the merged one."""
    with replaced_values(singles.model, placement.values), singles.merged(placement.beside):
        yield


class _Places:
    """Where the base's tensors are in the model."""

    def __init__(self, singles: Singles):
        self.base = singles.base
        self.parameters: Mapping[str, Tensor] = dict(singles.model.named_parameters(remove_duplicate=False))
        self.names = TensorNames(self.parameters)

    def find(self, part: MergedPart) -> tuple[str, Index]:
        """The parameter that holds it, and which part of that it is.

        Raises:
            InputError: there is none, or it is streamed from disk.
        """
        for place, index in self.base.places(self.base.own_name(part.base)).items():
            parameter = self.names.find(place)
            if parameter is None:
                continue
            if self.parameters[parameter].is_meta:
                raise InputError(
                    f"{part.name}: this merge replaces the whole tensor, and the base is streamed from disk; "
                    "give more memory, or score a merge of low rank"
                )
            return parameter, (*index, *part.index)
        raise InputError(f"{part.name}: the model in memory has no such parameter, so it cannot be scored")
