"""x"""

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

from mergekit_tspa.adapters import Adapter, Change, LoraModule
from mergekit_tspa.errors import InputError
from mergekit_tspa.merging.finish import Changed, Dora, MergedUpdate
from mergekit_tspa.methods.inputs import Parameters, Planned
from mergekit_tspa.methods.method import Method
from mergekit_tspa.updates import Dense, LowRank

LOG = logging.getLogger(__name__)


class TensorPlan(NamedTuple):
    """One weight to merge, before its factors are loaded."""

    name: str
    sources: Sequence[tuple[Adapter, str]]  # the adapter and its module
    weights: Sequence[float]
    parameters: Parameters
    changes: Sequence[tuple[Change, float]] = ()  # of adapters that trained it directly, and their weights

    @property
    def ranks(self) -> list[int]:
        return [module.rank for module in self.modules]

    @property
    def planned(self) -> Planned:
        return Planned(self.name, self.modules[0].shape, self.ranks, self.parameters)

    @property
    def nbytes(self) -> int:
        """Size of its factors in float32."""
        return sum(4 * module.rank * sum(module.shape) for module in self.modules)

    @property
    def modules(self) -> list[LoraModule]:
        return [adapter.modules[module] for adapter, module in self.sources]

    def finish(self, update: LowRank | Dense | None) -> MergedUpdate:
        """Add to the method's update what the method does not see: DoRA's magnitudes, and direct changes."""
        scale = self.parameters.lambda_ / type(self.parameters).model_fields["lambda_"].default
        if any(module.magnitude is not None for module in self.modules):
            magnitudes = [
                adapter.factors(name) if module.magnitude is None else module.magnitude
                for (adapter, name), module in zip(self.sources, self.modules)
            ]
            transposed = any(module.transposed for module in self.modules)
            shares = [scale * a / max(1, sum(map(abs, self.weights))) for a in self.weights]
            update = Dora(update, magnitudes, shares, transposed)
        return Changed(update, *zip(*self.changes), scale) if self.changes else update


def plan_tensor(
    method: Method,
    name: str,
    sources: Sequence[tuple[Adapter, str, float]],
    parameters: Parameters,
    changes: Sequence[tuple[Adapter, Change, float]] = (),
) -> TensorPlan | None:
    """Keep the adapters of non-zero weight; None when there is none.

    Raises:
        InputError: a weight is not finite, or below what the method is defined for.
    """
    for adapter, _, weight in (*sources, *changes):
        if not math.isfinite(weight) or weight < method.min_weight:
            raise InputError(
                f"{adapter.name}: weight {weight} for {name}: {method.name} takes finite weights"
                + (f" of at least {method.min_weight:g}" if math.isfinite(method.min_weight) else "")
            )
    kept = [(adapter, module, weight) for adapter, module, weight in sources if weight]
    changed = [(change, weight) for _, change, weight in changes if weight]
    if not kept and not changed:
        return None
    return TensorPlan(name, [k[:2] for k in kept], [k[2] for k in kept], parameters, changed)


def check_plans(method: Method, plans: Sequence[TensorPlan]) -> None:
    """What can be said of a whole merge before a factor is loaded.

    Raises:
        InputError: a `rank` that no weight's merged update carries (those that carry less stay as they are),
            unequal ranks where the method needs equal ones, statistics over the model with parameters that vary.
    """
    method.check([plan.planned for plan in plans])
    carried = 0
    for plan in plans:
        if method.equal_ranks and len(set(plan.ranks)) > 1:
            raise InputError(
                f"{plan.name}: {method.name} needs adapters of equal rank, and these have {plan.ranks}; use a method "
                "without that need (mergekit-tspa methods)"
            )
        carried = max(carried, method.carried(plan.planned))
    asked = [plan.parameters.rank for plan in plans if plan.parameters.rank is not None]
    if len(asked) == len(plans) and asked and min(asked) > carried:
        raise InputError(f"rank {min(asked)}: the merged updates carry rank {carried} at most; leave it out")
    if surveys(method, plans) and any(plan.parameters != plans[0].parameters for plan in plans):
        raise InputError(f"{method.name}: scope: model needs the same parameters for all weights; only weight may vary")
    if method.elects and (mixed := next((plan for plan in plans if min(plan.weights) < 0 < max(plan.weights)), None)):
        LOG.warning(
            "%s: weights of both signs (%s: %s): an adapter of negative weight votes, and counts, with the opposite "
            "of its update",
            *(method.name, mixed.name, ", ".join(f"{weight:g}" for weight in mixed.weights)),
        )


def surveys(method: Method, plans: Sequence[TensorPlan]) -> bool:
    """Whether the method asks for statistics over all weights before it merges the first."""
    return method.survey is not None and any(plan.parameters.scope == "model" for plan in plans)
