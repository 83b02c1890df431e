"""x"""

import logging
from collections.abc import Mapping, Sequence

import torch

from mergekit_tspa.adapters import Adapter, ExtractedModule
from mergekit_tspa.errors import InputError
from mergekit_tspa.linalg import finite, product_overflows
from mergekit_tspa.merging.plan import TensorPlan, surveys
from mergekit_tspa.methods.inputs import Pair, Progress, TensorInputs
from mergekit_tspa.methods.method import Merged, Method, prepared
from mergekit_tspa.methods.report import Truncation
from mergekit_tspa.updates import Dense, LowRank

LOG = logging.getLogger(__name__)


def survey_tensors(
    method: Method, plans: Sequence[TensorPlan], device: torch.device | str | None = None
) -> Mapping[Adapter, torch.Tensor] | None:
    """The method's statistics over the whole model, or None if it wants none."""
    if not surveys(method, plans):
        return None
    return method.survey(
        lambda: (prepared(w) for w in (load_tensor(method, plan, device) for plan in plans) if w.factors)
    )


def load_tensor(method: Method, plan: TensorPlan, device: torch.device | str | None) -> TensorInputs:
    """Load the factors of a weight in float32, without adapters whose update is zero.

    Raises:
        InputError: an adapter's update, its scale included, is too large for float32.
    """
    loaded = [
        (adapter.factors(module, device=device), weight, adapter)
        for (adapter, module), weight in zip(plan.sources, plan.weights)
    ]
    for (adapter, module), (factors, *_) in zip(plan.sources, loaded):
        if product_overflows(factors, factors.rank):
            raise InputError(f"{adapter.name}: its update of {module}, scale included, is too large for float32")
    if method.drops_zeros:
        loaded = [part for part in loaded if part[0].B.any() and part[0].A.any()]
    factors, weights, adapters = zip(*loaded) if loaded else ((), (), ())
    return TensorInputs(plan.name, factors, weights, plan.parameters, adapters)


def merge_tensors(
    method: Method,
    plans: Sequence[TensorPlan],
    pairs: Sequence["Pair"] = (),
    device: torch.device | str | None = None,
    progress: Progress = lambda stage, done, left: None,
    survey: Mapping[Adapter, torch.Tensor] | None = None,
) -> Merged:
    """Load the factors of all plans, merge them, and check that the updates are finite."""
    inputs = [load_tensor(method, plan, device)._replace(survey=survey) for plan in plans]
    _warn_of_zeros(plans, inputs)
    changed = [w for w in inputs if w.factors]
    merged = method.merge(changed, pairs, progress)
    updates = dict(zip((w.name for w in changed), merged.updates))
    kept: dict[str, float] = {}
    for plan in plans:
        update = updates.setdefault(plan.name, _zero(plan, device))
        if not finite(*update) or (len(update) == 2 and product_overflows(update, update.rank)):
            names = ", ".join(adapter.name for adapter, _ in plan.sources)
            raise InputError(f"{method.name}: the merged update of {plan.name} is not finite (adapters {names})")
        rank = plan.parameters.rank
        if rank and (rank < update.rank or isinstance(update, Dense)):
            updates[plan.name] = update.truncated(rank)
            kept[plan.name] = (updates[plan.name].norm() / update.norm()).item() ** 2 if update.norm() else 1.0
    reports = [*merged.reports, Truncation(kept)] if kept else merged.reports
    return Merged([updates[plan.name] for plan in plans], reports)


def _warn_of_zeros(plans: Sequence[TensorPlan], inputs: Sequence[TensorInputs]) -> None:
    dropped: dict[Adapter, list[str]] = {}
    for plan, w in zip(plans, inputs):
        for adapter, module in plan.sources:
            # A full model may well leave most weights as they are; log_kept counts them.
            if adapter not in w.adapters and not isinstance(adapter.modules[module], ExtractedModule):
                dropped.setdefault(adapter, []).append(plan.name)
    for adapter, names in dropped.items():
        LOG.warning(
            "%s: its update of %d weights is zero, %s among them; it takes no part there",
            *(adapter.name, len(names), names[0]),
        )


def _zero(plan: TensorPlan, device: torch.device | str | None) -> LowRank:
    d_out, d_in = plan.modules[0].shape
    return LowRank(torch.zeros(d_out, 1, device=device), torch.zeros(1, d_in, device=device))
