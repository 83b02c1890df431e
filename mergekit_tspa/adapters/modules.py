"""What an adapter does to one tensor: a low-rank update as stored, or a change of its values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_tspa.adapters.on_disk import Factor
from mergekit_tspa.updates import LoraFactors


@dataclass(eq=False)
class BasePart:
    """What PiSSA or OLoRA took out of a tensor of the base at training and put into the factors."""

    of: Callable[[Tensor], LoraFactors]  # the part of a tensor
    read: Callable[[], Tensor] | None = None  # the tensor; None while the base is not known
    known: LoraFactors | None = None

    def factors(self, device: torch.device | str | None) -> LoraFactors:
        """The part, computed in float32 when it is first asked for, and kept: it costs a decomposition."""
        if self.known is None:
            assert self.read is not None  # `Adapter.factors` refuses it
            self.known = self.of(self.read().to(device, torch.float32))
        return self.known


class LoraModule(NamedTuple):
    """The update of one tensor as it is stored: factors in the file's precision, and how to read them."""

    B: Factor  # (d_out, r), in memory or in the file
    A: Factor  # (r, d_in)
    scale: float = 1.0
    transposed: bool = False  # the base stores (d_in, d_out), as embeddings and GPT-2's Conv1D do
    embedding: bool = False
    magnitude: Tensor | None = None  # (d_out,), of DoRA
    base_part: BasePart | None = None
    convolution: bool = False  # PEFT's layer has factors with the dimensions of a kernel

    @property
    def rank(self) -> int:
        """The rank of its factors."""
        return self.A.shape[0] * (2 if self.base_part else 1)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the tensor it updates; a convolution's is taken as `(d_out, d_in * kernel)`."""
        shape = self.B.shape[0], self.A.shape[1]
        return shape[::-1] if self.transposed else shape

    def factors(self, dtype: torch.dtype, device: torch.device | str | None) -> LoraFactors:
        """`scale B A` in the base's orientation, less what was taken out of the base."""
        B, A = self.B.to(device, dtype), self.A.to(device, dtype)
        factors = LoraFactors(A.T, B.T) if self.transposed else LoraFactors(B, A)
        factors = factors.scaled(self.scale)
        if self.base_part is None:
            return factors
        taken = self.base_part.factors(device)
        B, A = (part.to(device, dtype) for part in taken)
        return LoraFactors(torch.cat([factors.B, -B], dim=1), torch.cat([factors.A, A], dim=0))


class Change(NamedTuple):
    """A tensor trained directly: its new values, those of some rows, or what is added to it."""

    value: Tensor
    rows: Tensor | None = None  # indices; None: all
    added: bool = False

    def difference(self, W: Tensor) -> Tensor:
        """New value minus old, in float32, of the rows it changes.

        Args:
            W: these rows of the base.
        """
        value = self.value.to(W.device, torch.float32)
        return value if self.added else value - W.float()

    def equals(self, other: "Change") -> bool:
        return self.added == other.added and all(
            (one is None) == (two is None) and (one is None or two is None or torch.equal(one, two))
            for one, two in ((self.value, other.value), (self.rows, other.rows))
        )
