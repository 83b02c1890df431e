"""A method: a name, its parameters, and one function from the adapters' factors to merged updates."""

import difflib
import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo

from mergekit_tspa.adapters import Adapter, Change, ExtractedModule, Extraction, LoraFactors, LoraModule
from mergekit_tspa.alignment.stiefel import Solution
from mergekit_tspa.errors import InputError
from mergekit_tspa.methods.pico import at_mean_norm, pico
from mergekit_tspa.methods.svc import svc
from mergekit_tspa.methods.update import Changed, Dense, Dora, LowRank, MergedUpdate
from mergekit_tspa.numerics import finite, product_overflows

LOG = logging.getLogger(__name__)


class Parameters(BaseModel, frozen=True, extra="forbid", populate_by_name=True):
    """Parameters that every method has; a method's own are fields of its subclass, in the order of the paper."""

    lambda_: float = Field(1.0, alias="lambda", allow_inf_nan=False, description="factor on the merged update")
    rank: int | None = Field(None, ge=1, description="reduce merged updates of a higher rank to this one, by SVD")
    extract_rank: int | None = Field(None, ge=1, description="rank of the factors of full models; 32 if not given")
    extract_energy: float | None = Field(
        None, gt=0, le=1, description="instead, the share of ||W - W_base||^2 that they keep, up to rank 256"
    )

    @property
    def extraction(self) -> Extraction:
        return Extraction(self.extract_rank, self.extract_energy)


PER_MODEL = ("extract_rank", "extract_energy")  # parameters that may differ from model to model


class OneByOneParameters(Parameters):
    """What may come before and after a closed formula that looks at one weight at a time."""

    pico: bool = Field(False, description="before merging, damp the output directions that adapters share (Pico)")
    svc: bool = Field(False, description="after merging, calibrate singular values that several adapters count (SVC)")

    def own(self) -> dict[str, Any]:
        """The method's own parameters, as its function takes them."""
        shared = OneByOneParameters.model_fields
        return {name: getattr(self, name) for name in type(self).model_fields if name not in shared}


class WeightInputs(NamedTuple):
    """Everything a method may know about one weight: the factors of the adapters that touch it, in recipe order."""

    name: str
    factors: Sequence[LoraFactors]
    weights: Sequence[float]  # a_t, never 0
    parameters: Parameters
    adapters: Sequence[Adapter] = ()  # whose factors they are
    survey: Mapping[Adapter, torch.Tensor] | None = None  # statistics over the whole model, where they are wanted

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
    adapters: Sequence[Sequence[Adapter]]  # of each problem
    angles: Sequence[torch.Tensor]  # (n,) of each: degrees, arccos of the mean cosine by which R_t turns
    scales: Sequence[torch.Tensor]  # (n,) of each: s_t

    @classmethod
    def of(
        cls, stage: str, names: Sequence[str], adapters: Sequence[Sequence[Adapter]], solution: Solution, axis: int
    ) -> "Report":
        """
        Args:
            axis: of the adapters in the solution's point
        """
        others = [i for i in range(1, solution.cosine.ndim) if i != axis]
        cosine = solution.cosine.mean(others) if others else solution.cosine
        return cls(
            stage,
            names,
            solution.start.cpu(),
            solution.end.cpu(),
            solution.orthogonality.max().item(),
            int(solution.steps.max()),
            adapters,
            [*cosine.clamp(-1, 1).acos().rad2deg().cpu()],
            [*solution.log_s.exp().cpu()],
        )

    @classmethod
    def joined(cls, reports: Sequence["Report"]) -> "Report":
        """What was done to all batches of one stage."""
        stage, names, start, end, orthogonality, steps, *of_each = zip(*reports)
        names, *of_each = ([*itertools.chain.from_iterable(lists)] for lists in (names, *of_each))
        return cls(stage[0], names, torch.cat(start), torch.cat(end), max(orthogonality), max(steps), *of_each)

    def __str__(self) -> str:
        return (
            f"{self.stage} of {len(self.names)}: objective {self.start.sum():.4g} -> {self.end.sum():.4g} "
            f"in {self.steps} steps, orthogonality {self.orthogonality:.0e}"
        )


class Truncation(NamedTuple):
    """What `rank` left of each merged update: the share of `||dW||^2`."""

    kept: Mapping[str, float]
    stage = "rank"

    @classmethod
    def joined(cls, reports: Sequence["Truncation"]) -> "Truncation":
        return cls(dict(item for report in reports for item in report.kept.items()))

    def __str__(self) -> str:
        worst = min(self.kept, key=self.kept.__getitem__)
        mean = sum(self.kept.values()) / len(self.kept)
        return (
            f"`rank` keeps {mean:.1%} of the energy of {len(self.kept)} merged updates on average, "
            f"{self.kept[worst]:.1%} of {worst}"
        )


def summary(reports: Iterable[Report | Truncation]) -> list[Report | Truncation]:
    """One report per stage."""
    stages: dict[str, list] = {}
    for report in reports:
        stages.setdefault(report.stage, []).append(report)
    return [type(group[0]).joined(group) for group in stages.values()]


Output = Literal["largest rank", "sum of ranks", "parameter rank", "k + n c", "clusters", "dense"]  # rank of an update
# What is being solved, which fraction of it is done, and of an objective which fraction of its start is left.
Progress = Callable[[str, float, float | None], None]


class Merged(NamedTuple):
    """Updates in the order of the inputs, and what the solvers report."""

    updates: list[LowRank | Dense]
    reports: list[Report | Truncation]


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
    output: Output
    merge: Callable[[Sequence[WeightInputs], Sequence["Pair"], Progress], Merged]  # noqa: F821
    parameters: type[Parameters] = Parameters
    min_weight: float = float("-inf")  # smallest `weight` the method is defined for
    attention: bool = False  # looks at attention products, hence at the base's weights
    solves: bool = False  # iterates, so that it is done, and can fail, before anything is written
    survey: Callable[[Callable[[], Iterable[WeightInputs]]], Mapping[Adapter, torch.Tensor]] | None = None
    record: Callable[[WeightInputs], dict[str, torch.Tensor]] | None = None  # what is written beside the model
    elects: bool = False  # lets the adapters vote on signs
    equal_ranks: bool = False  # of all adapters of a weight
    check: Callable[[Sequence["WeightPlan"]], None] = lambda plans: None  # refuses ranks that it cannot merge
    drops_zeros: bool = True  # an adapter whose update of a weight is zero takes no part in that weight

    def carried(self, plan: "WeightPlan") -> int:
        """The rank that a weight's merged update can have before `rank` cuts it."""
        shape = plan.modules[0].shape
        largest = self.output == "largest rank" or (self.output == "parameter rank" and plan.parameters.rank is None)
        total = max(plan.ranks) if largest else sum(plan.ranks)
        return min(shape) if self.output == "dense" else min(total, *shape)

    def bind(self, values: Mapping[str, Any]) -> Parameters:
        """Validated parameters; unknown names and values out of range are one sentence."""
        unknown = set(values) - set(self.parameter_fields())
        if unknown:
            raise InputError(self.unknown_parameter(min(unknown)))
        try:
            return self.parameters(**values)
        except ValidationError as error:
            first = error.errors()[0]
            where = f"parameter {first['loc'][0]}: {first['input']!r}: " if first["loc"] else ""
            raise InputError(f"{self.name}: {where}{first['msg']}") from error

    def extraction(self, values: Mapping[str, Any]) -> Extraction:
        """How full models become factors for this method.

        Raises:
            InputError: a value out of range, or ranks that are not known beforehand where they must be equal.
        """
        if self.equal_ranks and values.get("extract_energy"):
            raise InputError(f"extract_energy: {self.name} needs adapters of equal rank; give extract_rank instead")
        return self.bind({name: values[name] for name in PER_MODEL if name in values}).extraction

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
    def ranks(self) -> list[int]:
        return [module.rank for module in self.modules]

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
        if not math.isfinite(weight) or weight < method.min_weight:
            raise InputError(
                f"{adapter.name}: weight {weight} for {name}: {method.name} takes finite weights"
                + (f" of at least {method.min_weight:g}" if math.isfinite(method.min_weight) else "")
            )
    kept = [(adapter, module, weight) for adapter, module, weight in sources if weight]
    changed = [(change, weight) for _, change, weight in changes if weight]
    if not kept and not changed:
        return None
    return WeightPlan(name, [k[:2] for k in kept], [k[2] for k in kept], parameters, changed)


def check_plans(method: Method, plans: Sequence[WeightPlan]) -> None:
    """What can be said of a whole merge before a factor is loaded.

    Raises:
        InputError: a `rank` that no weight's merged update carries (those that carry less stay as they are),
            unequal ranks where the method needs equal ones, statistics over the model with parameters that vary.
    """
    method.check(plans)
    carried = 0
    for plan in plans:
        if method.equal_ranks and len(set(plan.ranks)) > 1:
            raise InputError(
                f"{plan.name}: {method.name} needs adapters of equal rank, and these have {plan.ranks}; use a method "
                "without that need (mergekit-tspa methods)"
            )
        carried = max(carried, method.carried(plan))
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


def surveys(method: Method, plans: Sequence[WeightPlan]) -> bool:
    """Whether the method asks for statistics over all weights before it merges the first."""
    return method.survey is not None and any(plan.parameters.scope == "model" for plan in plans)


def survey_weights(
    method: Method, plans: Sequence[WeightPlan], device: torch.device | str | None = None
) -> Mapping[Adapter, torch.Tensor] | None:
    """The method's statistics over the whole model, or None if it wants none."""
    if not surveys(method, plans):
        return None
    return method.survey(
        lambda: (_prepared(w) for w in (load_weight(method, plan, device) for plan in plans) if w.factors)
    )


def load_weight(method: Method, plan: WeightPlan, device: torch.device | str | None) -> WeightInputs:
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
    return WeightInputs(plan.name, factors, weights, plan.parameters, adapters)


def merge_weights(
    method: Method,
    plans: Sequence[WeightPlan],
    pairs: Sequence["Pair"] = (),  # noqa: F821
    device: torch.device | str | None = None,
    progress: Progress = lambda stage, done, left: None,
    survey: Mapping[Adapter, torch.Tensor] | None = None,
) -> Merged:
    """Load the factors of all plans, merge them, and check that the updates are finite."""
    inputs = [load_weight(method, plan, device)._replace(survey=survey) for plan in plans]
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


def _warn_of_zeros(plans: Sequence[WeightPlan], inputs: Sequence[WeightInputs]) -> None:
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


def _zero(plan: WeightPlan, device: torch.device | str | None) -> LowRank:
    d_out, d_in = plan.modules[0].shape
    return LowRank(torch.zeros(d_out, 1, device=device), torch.zeros(1, d_in, device=device))


def _prepared(w: WeightInputs) -> WeightInputs:
    """What comes before the method's own function."""
    return w._replace(factors=pico(w.factors)) if getattr(w.parameters, "pico", False) else w


def one_by_one(rule: Callable[[WeightInputs], LoraFactors | Dense]):
    """`Method.merge` of a closed formula that looks at one weight at a time, with `OneByOneParameters` or without."""

    def merge_one(w: WeightInputs) -> LowRank | Dense:
        p = w.parameters
        before, after = getattr(p, "pico", False), getattr(p, "svc", False)
        update = rule(_prepared(w))
        update = update if isinstance(update, Dense) else LowRank(*update)
        if before or after:
            weighted = [f.scaled(a) for f, a in zip(w.factors, w.weights)]
            update = at_mean_norm(update, weighted) if before else update
            update = svc(update, weighted) if after else update
        return update.scaled(p.lambda_)

    def merge(inputs: Sequence[WeightInputs], pairs: Sequence, progress: Progress) -> Merged:
        updates = []
        for i, w in enumerate(inputs):
            if len(inputs) > 1:
                progress("merging", i / len(inputs), None)
            updates.append(merge_one(w))
        return Merged(updates, [])

    return merge
