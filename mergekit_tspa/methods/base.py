"""A method: a name, its parameters, and one function from the adapters' factors to merged updates."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo

from mergekit_tspa.adapters import Adapter, LoraFactors
from mergekit_tspa.errors import InputError
from mergekit_tspa.methods.update import LowRank, MergedUpdate


class Parameters(BaseModel, frozen=True, extra="forbid", populate_by_name=True):
    """Parameters that every method has; a method's own are fields of its subclass, in the order of the paper."""

    lambda_: float = Field(1.0, alias="lambda", allow_inf_nan=False, description="factor on the merged update")


class WeightInputs(NamedTuple):
    """Everything a method may know about one weight: the factors of the adapters that touch it, in recipe order."""

    name: str
    factors: Sequence[LoraFactors]
    weights: Sequence[float]  # a_t, never 0
    parameters: Parameters


@dataclass(frozen=True)
class Method:
    """One row of the method table.

    `merge` takes all weights of a chunk at once, so that a method may solve them in one batch, and returns
    their updates in the same order.
    """

    name: str
    title: str
    summary: str
    paper: str
    url: str
    output: str  # rank of the result
    merge: Callable[[Sequence[WeightInputs]], list[MergedUpdate]]
    parameters: type[Parameters] = Parameters
    min_weight: float = float("-inf")  # smallest `weight` the method is defined for

    def bind(self, values: Mapping[str, Any]) -> Parameters:
        """Validated parameters; unknown names and values out of range are one sentence."""
        unknown = set(values) - set(self.parameter_fields())
        if unknown:
            raise InputError(self.unknown_parameter(min(unknown)))
        try:
            return self.parameters(**values)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{self.name}: parameter {first['loc'][0]}: {first['input']!r}: {first['msg']}") from error

    def parameter_fields(self) -> dict[str, FieldInfo]:
        """The parameters by their recipe names."""
        return {field.alias or name: field for name, field in self.parameters.model_fields.items()}

    def unknown_parameter(self, name: str) -> str:
        known = ["weight", *self.parameter_fields()]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
        return f"{self.name} has no parameter {name!r}; {hint}"


class WeightPlan(NamedTuple):
    """One weight to merge, before its factors are loaded."""

    name: str
    sources: Sequence[tuple[Adapter, str]]  # the adapter and its module
    weights: Sequence[float]
    parameters: Parameters

    @property
    def nbytes(self) -> int:
        """Size of its factors in float32."""
        return sum(4 * module.A.numel() + 4 * module.B.numel() for module in self._modules())

    def _modules(self):
        return (adapter.modules[module] for adapter, module in self.sources)


def plan_weight(
    method: Method, name: str, sources: Sequence[tuple[Adapter, str, float]], parameters: Parameters
) -> WeightPlan | None:
    """Keep the adapters of non-zero weight; None when there is none.

    Raises:
        InputError: a weight is not finite, or below what the method is defined for.
    """
    for adapter, _, weight in sources:
        if not isfinite(weight) or weight < method.min_weight:
            raise InputError(
                f"{adapter.name}: weight {weight} for {name}: {method.name} takes finite weights"
                + (f" of at least {method.min_weight:g}" if isfinite(method.min_weight) else "")
            )
    kept = [(adapter, module, weight) for adapter, module, weight in sources if weight]
    if not kept:
        return None
    return WeightPlan(name, [k[:2] for k in kept], [k[2] for k in kept], parameters)


def merge_weights(
    method: Method, plans: Sequence[WeightPlan], device: torch.device | str | None = None
) -> list[MergedUpdate]:
    """Load the factors of all plans in float32, merge them, and check that the updates are finite."""
    inputs = [
        WeightInputs(p.name, [a.factors(m, device=device) for a, m in p.sources], p.weights, p.parameters)
        for p in plans
    ]
    merged = method.merge(inputs)
    for plan, update in zip(plans, merged):
        if not all(torch.isfinite(t).all() for t in update):
            names = ", ".join(adapter.name for adapter, _ in plan.sources)
            raise InputError(f"{method.name}: the merged update of {plan.name} is not finite (adapters {names})")
    return merged


def one_by_one(
    rule: Callable[[Sequence[LoraFactors], Sequence[float]], LoraFactors],
) -> Callable[[Sequence[WeightInputs]], list[MergedUpdate]]:
    """`Method.merge` of a closed formula that looks at one weight at a time."""

    def merge(inputs: Sequence[WeightInputs]) -> list[MergedUpdate]:
        return [LowRank(*rule(w.factors, w.weights).scaled(w.parameters.lambda_)) for w in inputs]

    return merge
