"""From merged updates to tensors: DoRA's magnitudes and directly trained tensors join, and the base is
rounded once.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mergekit_tspa.adapters import Adapter, Change
from mergekit_tspa.base.tensors import Index
from mergekit_tspa.errors import InputError
from mergekit_tspa.linalg import finite
from mergekit_tspa.merging.outputs import OutputTensor, TensorPlan
from mergekit_tspa.methods.inputs import Parameters
from mergekit_tspa.updates import Dense, LoraFactors, LowRank


class Dora(NamedTuple):
    """Directions merged by a method, magnitudes merged apart:

        V = W + dW,    m = m_0 + sum_t a_t (m_t - m_0) / max(1, sum_t |a_t|),    W' = diag(m / ||V||) V

    with norms of rows (of columns, where the base stores the transpose) and `m_0 = ||W||`.  For one DoRA
    adapter of weight 1 this is its own merge (Liu et al., DoRA, 2024, arXiv 2402.09353).  Several of weight 1
    are averaged, as a sum of their magnitudes' changes could pass 0 and turn rows around.
    """

    update: LowRank | Dense
    magnitudes: Sequence[
        Tensor | LoraFactors
    ]  # m_t (d_out,); of an adapter without, its update: m_t = ||W + B_t A_t||
    weights: Sequence[float]  # a_t / max(1, sum |a_t|), lambda included
    transposed: bool = False

    def apply_to(self, W: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`W'`, computed in the precision of the update, and rounded once to `dtype` if that is given."""
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
        turned = V * (ratio if self.transposed else ratio.view(-1, *[1] * (V.ndim - 1)))
        return turned.to(dtype or V.dtype)

    def _norms(self, W: Tensor) -> Tensor:
        return torch.linalg.vector_norm(W.flatten(1), dim=0 if self.transposed else 1)


def mean_change(W: Tensor, changes: Sequence[Change], weights: Sequence[float]) -> Tensor:
    """`sum_t a_t delta_t / sum_t |a_t|` over the adapters that trained the tensor itself, in float32.

    No method looks at such tensors (biases, norms, heads, embeddings, token rows), and there is no update
    whose size a weight could set, so all of them merge as this mean.  Of trained tokens, a row's mean is over
    the adapters that have this row.  Adapters that leave the tensor unchanged are excluded from its mean.

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

    def apply_to(self, W: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The new tensor, in `dtype`, or in float32 or the update's precision."""
        updated = self.update.apply_to(W) if self.update else W.float()
        updated = updated + self.scale * mean_change(W, self.changes, self.weights)
        return updated.to(dtype or updated.dtype)


MergedUpdate: TypeAlias = LowRank | Dense | Dora | Changed


def low_rank(update: MergedUpdate) -> LowRank:
    """An update as factors; one whose rank is no larger than `rank` may still be dense."""
    if isinstance(update, LowRank):
        return update
    assert isinstance(update, Dense)  # magnitudes and trained tensors are refused before
    return update.truncated(update.rank)


def finish(plan: TensorPlan, update: LowRank | Dense | None) -> MergedUpdate:
    """Add to the method's update what the method does not see: DoRA's magnitudes, and direct changes.

    Args:
        update: what the method made of the tensor; None if no adapter has factors for it
    """
    scale = _scale(plan.parameters)
    finished: LowRank | Dense | Dora | None = update
    if update is not None and plan.is_dora:
        magnitudes = [
            adapter.factors(name) if module.magnitude is None else module.magnitude
            for (adapter, name), module in zip(plan.sources, plan.modules)
        ]
        transposed = any(module.transposed for module in plan.modules)
        shares = [scale * a / max(1, sum(map(abs, plan.weights))) for a in plan.weights]
        finished = Dora(update, magnitudes, shares, transposed)
    if plan.changes:
        changes, weights = zip(*plan.changes)
        return Changed(finished, changes, weights, scale)
    if finished is None:
        raise ValueError(f"{plan.name}: nothing is merged there")
    return finished


def _scale(parameters: Parameters) -> float:
    """`lambda` as a multiple of the method's default; a length that is found by texts is the default."""
    default = type(parameters).model_fields["lambda_"].default
    if isinstance(parameters.lambda_, str) or parameters.lambda_ == default:
        return 1.0
    return parameters.lambda_ / (1.0 if isinstance(default, str) else default)


def apply_parts(W: Tensor, parts: Sequence[tuple[Index, MergedUpdate]], dtype: torch.dtype) -> Tensor:
    """A tensor with its parts updated in the precision of the updates, rounded once."""
    result = None
    for index, update in sorted(parts, key=lambda part: len(part[0])):
        if index == ():
            W = update.apply_to(W, dtype if len(parts) == 1 else None)
        else:
            result = W.to(dtype, copy=True) if result is None else result
            result[index] = update.apply_to(W[index], dtype)
    return W.to(dtype) if result is None else result


def finish_tensor(
    output: OutputTensor, W: Tensor, updates: Mapping[str, LowRank | Dense], dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor of the merged model.

    Args:
        W: the base's
        updates: merged, by the names of the parts
        dtype: of the result, by default that of `W`

    Raises:
        InputError: the result is not finite.
    """
    dtype = dtype or W.dtype
    parts = [(part.index, finish(part.plan, updates.get(part.plan.name))) for part in output.parts]
    merged = apply_parts(W, parts, dtype)
    if not finite(merged):
        raise InputError(f"{output.base}: the merged weight holds NaN, or is too large for {dtype}")
    return merged


def apply_adapter(
    W: Tensor,
    adapter: Adapter,
    modules: Mapping[str, str],
    parts: Mapping[str, Index],
    device: torch.device | str,
) -> Tensor:
    """A tensor of the base with one adapter of weight 1, in the base's dtype.

    Args:
        modules: `{tensor, or expert of a fused one: module that updates it}`
        parts: what the adapter changes of this tensor, and where
    """
    applied = []
    for part, index in parts.items():
        sources = [(adapter, modules[part])] if part in modules else []
        changes = [(adapter.changes[part], 1.0)] if part in adapter.changes else []
        plan = TensorPlan(part, sources, [1.0] * len(sources), Parameters(), changes)
        update = LowRank(*adapter.factors(modules[part], device=device)) if sources else None
        applied.append((index, finish(plan, update)))
    return apply_parts(W, applied, W.dtype)
