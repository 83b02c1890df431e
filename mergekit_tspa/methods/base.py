"""A method: a name, its parameters, and one function from the adapters' factors to merged updates."""

import difflib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo

from mergekit_tspa.adapters import Adapter, Change, LoraFactors, LoraModule
from mergekit_tspa.alignment.stiefel import Solution
from mergekit_tspa.errors import InputError
from mergekit_tspa.methods.update import Changed, Dense, Dora, LowRank, MergedUpdate


class Parameters(BaseModel, frozen=True, extra="forbid", populate_by_name=True):
    """Parameters that every method has; a method's own are fields of its subclass, in the order of the paper."""

    lambda_: float = Field(1.0, alias="lambda", allow_inf_nan=False, description="factor on the merged update")
    rank: int | None = Field(None, ge=1, description="reduce merged updates of a higher rank to this one, by SVD")


class WeightInputs(NamedTuple):
    """Everything a method may know about one weight: the factors of the adapters that touch it, in recipe order."""

    name: str
    factors: Sequence[LoraFactors]
    weights: Sequence[float]  # a_t, never 0
    parameters: Parameters
    adapters: Sequence[Adapter] = ()  # whose factors they are

    def generator(self, seed: int, *names: str) -> torch.Generator:
        """A source of randomness that depends on the seed and on names only, not on the order of execution."""
        digest = hashlib.sha256("\0".join((str(seed), self.name, *names)).encode()).digest()
        return torch.Generator(self.factors[0].B.device).manual_seed(int.from_bytes(digest[:7], "big"))


class Report(NamedTuple):
    """What a solver did to a batch."""

    stage: str
    names: Sequence[str]  # of the problems
    start: torch.Tensor  # (problems,) objective before the first step
    end: torch.Tensor  # (problems,)
    orthogonality: float  # largest entry of |R^T R - I|
    steps: int

    @classmethod
    def of(cls, stage: str, names: Sequence[str], solution: Solution) -> "Report":
        return cls(
            stage,
            names,
            solution.start.cpu(),
            solution.end.cpu(),
            solution.orthogonality.max().item(),
            int(solution.steps.max()),
        )

    def __str__(self) -> str:
        return (
            f"{self.stage} of {len(self.names)}: objective {self.start.sum():.4g} -> {self.end.sum():.4g} "
            f"in {self.steps} steps, orthogonality {self.orthogonality:.0e}"
        )


Progress = Callable[[str, float], None]  # what is being solved, and which fraction of it is done


class Merged(NamedTuple):
    """Updates in the order of the inputs, and what the solvers report."""

    updates: list[LowRank | Dense]
    reports: list[Report]


@dataclass(frozen=True)
class Method:
    """One row of the method table.

    `merge` takes all weights of a chunk at once, so that a method may solve them in one batch, the attention
    pairs they belong to (for methods with `attention`), and a function to report progress to.
    """

    name: str
    title: str
    summary: str
    paper: str
    url: str
    output: Literal["largest rank", "sum of ranks"]  # rank of the result
    merge: Callable[[Sequence[WeightInputs], Sequence["Pair"], Progress], Merged]  # noqa: F821
    parameters: type[Parameters] = Parameters
    min_weight: float = float("-inf")  # smallest `weight` the method is defined for
    attention: bool = False  # looks at attention products, hence at the base's weights
    solves: bool = False  # iterates, so that it is done, and can fail, before anything is written

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
    changes: Sequence[tuple[Change, float]] = ()  # of adapters that trained it directly, and their weights

    @property
    def nbytes(self) -> int:
        """Size of its factors in float32."""
        return sum(4 * module.rank * sum(module.shape) for module in self.modules)

    @property
    def modules(self) -> list[LoraModule]:
        return [adapter.modules[module] for adapter, module in self.sources]

    def finish(self, update: LowRank | Dense | None) -> MergedUpdate:
        """Add to the method's update what the method does not see: DoRA's magnitudes, and direct changes."""
        scale = self.parameters.lambda_
        if any(module.magnitude is not None for module in self.modules):
            magnitudes = [
                adapter.factors(name) if module.magnitude is None else module.magnitude
                for (adapter, name), module in zip(self.sources, self.modules)
            ]
            update = Dora(update, magnitudes, [scale * a for a in self.weights], self.modules[0].transposed)
        return Changed(update, *zip(*self.changes), scale) if self.changes else update


def plan_weight(
    method: Method,
    name: str,
    sources: Sequence[tuple[Adapter, str, float]],
    parameters: Parameters,
    changes: Sequence[tuple[Adapter, Change, float]] = (),
) -> WeightPlan | None:
    """Keep the adapters of non-zero weight; None when there is none.

    Raises:
        InputError: a weight is not finite, or below what the method is defined for.
    """
    for adapter, _, weight in (*sources, *changes):
        if not isfinite(weight) or weight < method.min_weight:
            raise InputError(
                f"{adapter.name}: weight {weight} for {name}: {method.name} takes finite weights"
                + (f" of at least {method.min_weight:g}" if isfinite(method.min_weight) else "")
            )
    kept = [(adapter, module, weight) for adapter, module, weight in sources if weight]
    changed = [(change, weight) for _, change, weight in changes if weight]
    if not kept and not changed:
        return None
    return WeightPlan(name, [k[:2] for k in kept], [k[2] for k in kept], parameters, changed)


def check_ranks(method: Method, plans: Sequence[WeightPlan]) -> None:
    """Refuse a `rank` that no weight's merged factors carry; those that carry less stay as they are."""
    asked = [plan for plan in plans if plan.parameters.rank is not None]
    ranks = [[module.rank for module in plan.modules] for plan in asked]
    carried = max((sum(r) if method.output == "sum of ranks" else max(r) for r in ranks), default=0)
    if asked and min(plan.parameters.rank for plan in asked) > carried:
        raise InputError(
            f"rank {asked[0].parameters.rank}: the merged factors carry rank {carried} at most; leave it out"
        )


def merge_weights(
    method: Method,
    plans: Sequence[WeightPlan],
    pairs: Sequence["Pair"] = (),  # noqa: F821
    device: torch.device | str | None = None,
    progress: Progress = lambda stage, done: None,
) -> Merged:
    """Load the factors of all plans in float32, merge them, and check that the updates are finite."""
    inputs = [
        WeightInputs(
            plan.name,
            [adapter.factors(module, device=device) for adapter, module in plan.sources],
            plan.weights,
            plan.parameters,
            [adapter for adapter, _ in plan.sources],
        )
        for plan in plans
    ]
    merged = method.merge(inputs, pairs, progress)
    for i, (plan, update) in enumerate(zip(plans, merged.updates)):
        if not all(torch.isfinite(t).all() for t in update):
            names = ", ".join(adapter.name for adapter, _ in plan.sources)
            raise InputError(f"{method.name}: the merged update of {plan.name} is not finite (adapters {names})")
        if (plan.parameters.rank or update.rank) < update.rank:
            merged.updates[i] = update.truncated(plan.parameters.rank)
    return merged


def one_by_one(rule: Callable[[WeightInputs], LoraFactors]):
    """`Method.merge` of a closed formula that looks at one weight at a time."""

    def merge(inputs: Sequence[WeightInputs], pairs: Sequence, progress: Progress) -> Merged:
        return Merged([LowRank(*rule(w).scaled(w.parameters.lambda_)) for w in inputs], [])

    return merge
