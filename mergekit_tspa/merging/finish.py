"""What is done to one weight: a method's low-rank or dense update, and what comes on top without its doing."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mergekit_tspa.adapters import Change
from mergekit_tspa.base.tensors import Index
from mergekit_tspa.updates import Dense, LoraFactors, LowRank


class Dora(NamedTuple):
    """Directions merged by a method, magnitudes merged apart:

        V = W + dW,    m = m_0 + sum_t a_t (m_t - m_0) / max(1, sum_t |a_t|),    W' = diag(m / ||V||) V

    with norms of rows (of columns, where the base stores the transpose) and `m_0 = ||W||`.  For one DoRA adapter
    of weight 1 this is its own merge (Liu et al., DoRA, 2024, arXiv 2402.09353).  Several of weight 1 are averaged,
    as a sum of their magnitudes' changes could pass 0 and turn rows around.
    """

    update: LowRank | Dense
    magnitudes: Sequence[Tensor | LoraFactors]  # m_t (d_out,); of an adapter without, its update: m_t = ||W + B_t A_t||
    weights: Sequence[float]  # a_t / max(1, sum |a_t|), lambda included
    transposed: bool = False

    def apply_to(self, W: Tensor) -> Tensor:
        """`W'`, computed and returned in the precision of the update."""
        V = self.update.apply_to(W)
        start = self._norms(W.to(V.dtype))
        m = start.clone()
        for magnitude, weight in zip(self.magnitudes, self.weights):
            if isinstance(magnitude, LoraFactors):
                factors = LowRank(*(factor.to(V) for factor in magnitude))
                m += weight * (self._norms(factors.apply_to(W)) - start)
            else:
                m += weight * (magnitude.to(V) - start)
        tiny = torch.finfo(V.dtype).tiny  # a row of zeros stays one
        ratio = m / self._norms(V).clamp_min(tiny)
        return V * (ratio if self.transposed else ratio.view(-1, *[1] * (V.ndim - 1)))

    def _norms(self, W: Tensor) -> Tensor:
        return torch.linalg.vector_norm(W.flatten(1), dim=0 if self.transposed else 1)


def mean_change(W: Tensor, changes: Sequence[Change], weights: Sequence[float]) -> Tensor:
    """`sum_t a_t delta_t / sum_t |a_t|` over the adapters that trained the tensor itself, in float32.

    No method looks at such tensors (biases, norms, heads, embeddings, token rows), and there is no update whose
    size a weight could set: so they all merge as this mean.  Of trained tokens, a row's mean is over the adapters
    that have this row.  Who left the tensor as it was has no part in the mean.

    Args:
        W: the base's tensor.
    """
    total, mass = torch.zeros_like(W, dtype=torch.float32), W.new_zeros(W.shape[:1], dtype=torch.float32)
    for change, weight in zip(changes, weights):
        rows = ... if change.rows is None else change.rows.to(W.device)
        difference = change.difference(W[rows])
        if difference.any():
            total[rows] += weight * difference
            mass[rows] += abs(weight)
    mass[mass == 0] = 1
    return total / mass.view(mass.shape + (1,) * (W.ndim - 1))


class Changed(NamedTuple):
    """An update, if there is one, and `scale` times the mean of the adapters' own changes."""

    update: LowRank | Dense | Dora | None
    changes: Sequence[Change]
    weights: Sequence[float]
    scale: float

    def apply_to(self, W: Tensor) -> Tensor:
        """The new tensor, in float32 or the update's precision."""
        updated = self.update.apply_to(W) if self.update else W.float()
        return updated + self.scale * mean_change(W, self.changes, self.weights)


MergedUpdate: TypeAlias = LowRank | Dense | Dora | Changed


def apply_parts(W: Tensor, parts: Iterable[tuple[Index, MergedUpdate]], dtype: torch.dtype) -> Tensor:
    """A tensor with its parts updated in the precision of the updates, rounded once."""
    result = None
    for index, update in sorted(parts, key=lambda part: len(part[0])):
        if index == ():
            W = update.apply_to(W)
        else:
            result = W.to(dtype, copy=True) if result is None else result
            result[index] = update.apply_to(W[index])
    return W.to(dtype) if result is None else result
