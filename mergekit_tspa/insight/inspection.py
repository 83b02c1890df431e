"""All numbers of one report: what `measures` says of every module, and what a merge leaves of the
adapters.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_tspa.adapters import Adapter, ExtractedModule
from mergekit_tspa.errors import InputError
from mergekit_tspa.insight.measures import SAMPLE, Measures, cosines, interference, measure
from mergekit_tspa.linalg import product_overflows
from mergekit_tspa.merging.outputs import TensorPlan
from mergekit_tspa.merging.plan import MergePlan
from mergekit_tspa.methods.inputs import Progress, silent
from mergekit_tspa.methods.report import Report, Truncation, summary
from mergekit_tspa.symmetry.alignment_report import summary as summary_of_alignment
from mergekit_tspa.updates import LoraFactors

_BYTES = 2**28  # what one stack of modules may take


@dataclass(frozen=True)
class Place:
    """Where a weight is in the model."""

    layer: int | None
    kind: str  # its name without the layer, such as `self_attn.v_proj`

    @classmethod
    def of(cls, tensor: str) -> "Place":
        """Experts of a layer are one kind.

        >>> Place.of("model.layers.3.self_attn.v_proj.weight")
        Place(layer=3, kind='self_attn.v_proj')
        """
        name = tensor.removesuffix(".weight")
        found = re.match(r"(.*?)\.(\d+)\.(.*)", name)
        layer, kind = (int(found[2]), found[3]) if found else (None, name)
        kind = re.sub(r"(?<=\.)\d+(?=\.)|\[\d+\]", "*", kind)
        tower = found and re.search(r"[^.]*(?:vision|audio|encoder|decoder)[^.]*", found[1])
        return cls(layer, f"{tower[0]}: {kind}" if tower else kind)


@dataclass
class Merge:
    """What a method makes of the adapters, on the modules that were merged; NaN on the others."""

    method: str
    inner: Tensor  # (m, n)  <M, D_t>
    norm: Tensor  # (m,)  ||M||
    reports: list[Report | Truncation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def measured(self) -> Tensor:
        return ~self.norm.isnan()  # (m,)


class Stage(NamedTuple):
    """One stage of TSPA over all its problems: attention products, or weights."""

    name: str
    problems: list[str]
    start: Tensor  # (p,) objective
    end: Tensor  # (p,)
    angles: Tensor  # (p, n) degrees; NaN of adapters that have no part
    scales: Tensor  # (p, n)

    @classmethod
    def of(cls, report: Report, adapters: Sequence[Adapter]) -> "Stage":
        angles, scales = torch.full((2, len(report.names), len(adapters)), nan, dtype=torch.float64)
        for row, (present, turned, scaled) in enumerate(zip(report.adapters, report.angles, report.scales)):
            columns = [adapters.index(adapter) for adapter in present]
            angles[row, columns], scales[row, columns] = turned.double(), scaled.double()
        return cls(report.stage, [*report.names], report.start.double(), report.end.double(), angles, scales)


@dataclass
class Inspection:
    """m modules, n adapters."""

    adapters: list[Adapter]
    kinds_of: list[str]  # what their configurations call them
    tensors: list[str]  # (m,)
    widths: list[int]  # (m,)  d_in
    weights: Tensor  # (m, n)  a_t; NaN where an adapter does not touch a module
    measures: Measures
    notes: list[str]  # what is not measured
    title: str  # of the recipe, or what stands for one
    base: str = ""  # that of a recipe
    merge: Merge | None = None

    def __post_init__(self):
        self.names = short_names([adapter.name for adapter in self.adapters])
        self.places = _shortened([Place.of(tensor) for tensor in self.tensors])
        self.layers = sorted({p.layer for p in self.places if p.layer is not None})
        self.kinds = list(dict.fromkeys(p.kind for p in self.places if p.layer is not None))
        cells = {
            place: i for i, place in enumerate(Place(x, kind) for kind in self.kinds for x in self.layers)
        }
        self.cells = torch.tensor(
            [cells.get(place, -1) for place in self.places]
        )  # (m,)  in a grid; -1: not there
        n = len(self.names)
        self.cosines = cosines(self.measures.inner)  # (m, n, n)
        self.ratio, self.cross = interference(self.measures.inner, self.weights)  # (m,)
        self.pairs = [(t, u) for t in range(n) for u in range(t + 1, n)]
        # With a negative weight an adapter pulls the other way.
        signs = self.weights.nan_to_num(1).sign()
        self.pulls = self.cosines * signs[:, :, None] * signs[:, None]  # (m, n, n)

    def layer_of(self, problem: str) -> int | None:
        """Of a weight, or of a pair such as `model.layers.3.self_attn qk`."""
        return Place.of(problem.replace(" ", ".")).layer

    @property
    def shared(self) -> Tensor:
        """Whether two adapters touch a module, neither with a zero update  # (m, n, n)"""
        return ~self.cosines.isnan()

    def total_norms(self) -> Tensor:
        """`||D_t||` over all modules  # (n,)"""
        return self.measures.norm.square().nansum(0).sqrt()

    def total_cosines(self) -> Tensor:
        """Of the updates of the whole model; NaN between adapters that share no module  # (n, n)"""
        return cosines(self.measures.inner.nansum(0)).where(self.shared.any(0), nan)

    def total_interference(self) -> tuple[float, float]:
        """As `interference`, of the updates of the whole model taken as one vector each."""
        a = self.weights.nan_to_num()
        inner = (self.measures.inner.nan_to_num() * a[:, :, None] * a[:, None]).sum(0)
        ratio, cross = interference(inner, torch.ones(len(inner)).double())
        return ratio.item(), cross.item()

    def survival(self) -> tuple[Tensor, Tensor]:
        """`<M, D_t> / ||D_t||^2` (m, n) and the cosine of M and D_t (m, n); NaN where nothing was merged."""
        assert self.merge is not None
        inner, norm = self.merge.inner, self.measures.norm
        norm = norm.where(norm > 0, nan)
        merged = self.merge.norm[:, None]
        return inner / norm**2, (inner / (norm * merged.where(merged > 0, nan))).clamp(-1, 1)

    def total_survival(self) -> tuple[Tensor, Tensor]:
        """The same over all measured modules together  # (n,), (n,)"""
        assert self.merge is not None
        done = self.merge.measured
        norm2, inner = self.measures.norm[done].square().nansum(0), self.merge.inner[done].nansum(0)
        norm2 = norm2.where(norm2 > 0, nan)
        return inner / norm2, inner / (norm2.sqrt() * self.merge.norm[done].square().sum().sqrt())

    def pair_means(self, values: Tensor) -> dict[tuple[int, int], float]:
        """Means over the modules of values (m, n, n), of the pairs that have any."""
        means = zip(self.pairs, self.of_pairs(values).nanmean(0).tolist())
        return {pair: mean for pair, mean in means if mean == mean}

    def of_pairs(self, values: Tensor) -> Tensor:
        """Values (m, n, n) of all pairs  # (m, pairs)"""
        return values[(slice(None), *torch.triu_indices(len(self.names), len(self.names), 1))]

    def chance(self) -> float:
        """The overlap that random row spaces of these ranks have on average, `max(r_t, r_u) / d_in`."""
        ranks = self.measures.rank
        larger = torch.maximum(ranks[:, :, None], ranks[:, None]) / torch.tensor(self.widths)[:, None, None]
        means = self.pair_means(larger.where(self.shared, nan))
        return sum(means.values()) / len(means)

    def growth_apart(self) -> float | None:
        """How many times the norm of the sum the factors summed apart have, over modules of equal ranks."""
        total, apart = self.measures.inner.nansum((1, 2)), self.measures.apart.square()
        known = ~apart.isnan() & self.shared.flatten(1).sum(1).gt(1)
        total = total[known].sum()
        return (apart[known].sum() / total).sqrt().item() if total > 0 else None

    def stages(self) -> list[Stage]:
        """What TSPA's solvers did, stage by stage, over all batches."""
        reports = summary(self.merge.reports) if self.merge else []
        return [Stage.of(report, self.adapters) for report in reports if isinstance(report, Report)]

    def grid(self, values: Tensor) -> Tensor:
        """Values of the modules, (m,), by kind and layer; the mean where several experts share a place."""
        known = (self.cells >= 0) & ~values.isnan()
        cells, shape = self.cells[known], torch.Size((len(self.kinds), len(self.layers)))
        total = torch.zeros(shape.numel()).double().index_add(0, cells, values[known])
        return (total / torch.bincount(cells, minlength=shape.numel())).view(shape)


def inspect_plan(
    plan: MergePlan,
    adapters: Sequence[Adapter],
    kinds_of: Sequence[str],
    title: str,
    progress: Progress = silent,
    device: torch.device | str | None = None,
    notes: Sequence[str] = (),
) -> Inspection:
    """Measure all that a plan merges.

    Modules of one shape that adapters of the same ranks touch are measured together.

    Raises:
        InputError: there is nothing to measure, or an update is too large for float32.
    """
    low_rank = plan.tensors
    if not low_rank:
        raise InputError("no adapter has a low-rank update, so there is nothing to inspect")
    index = {adapter: t for t, adapter in enumerate(adapters)}
    measures = Measures.empty(len(low_rank), len(adapters))
    weights = measures.norm.clone()
    stacks: dict[tuple, list[int]] = {}
    for i, tensor in enumerate(low_rank):
        present = tuple(index[adapter] for adapter, _ in tensor.sources)
        weights[i, list(present)] = torch.tensor(tensor.weights, dtype=torch.float64)
        stacks.setdefault((tensor.shape, present, tuple(tensor.ranks), _made(tensor)), []).append(i)
    done = 0
    for (shape, present, ranks, made), modules in stacks.items():
        each = 24 * sum(ranks) * sum(shape) + 12 * len(present) * SAMPLE
        size = (
            1 if made else max(1, _BYTES // each)
        )  # ranks of factors made on the way are not known beforehand
        for part in (modules[i : i + size] for i in range(0, len(modules), size)):
            progress("measuring", done / len(low_rank))
            loaded = [[_load(*low_rank[i].sources[t], device) for i in part] for t in range(len(present))]
            factors = [LoraFactors(*map(torch.stack, zip(*stack))) for stack in loaded]
            measures.put(part, present, measure(factors))
            done += len(part)
    progress("measuring", 1.0)
    tensors, widths = [tensor.name for tensor in low_rank], [tensor.shape[1] for tensor in low_rank]
    notes = [*notes, *_not_measured(plan.every), *_aligned(adapters)]
    return Inspection([*adapters], [*kinds_of], tensors, widths, weights, measures, notes, title)


def _made(plan: TensorPlan) -> bool:
    return any(isinstance(module, ExtractedModule) for module in plan.modules)


def _load(adapter: Adapter, module: str, device: torch.device | str | None) -> LoraFactors:
    factors = adapter.factors(module, device=device)
    if product_overflows(factors, factors.rank):
        raise InputError(f"{adapter.name}: its update of {module}, scale included, is too large for float32")
    return factors


def _not_measured(plans: Sequence[TensorPlan]) -> list[str]:
    """What adapters do beside low-rank updates."""
    notes = []
    kept: dict[str, list[float]] = {}
    magnitudes: dict[str, int] = {}
    changes = [plan.name for plan in plans if plan.changes]
    for plan in plans:
        for (adapter, _), module in zip(plan.sources, plan.modules):
            if module.magnitude is not None:
                magnitudes[adapter.name] = magnitudes.get(adapter.name, 0) + 1
            if isinstance(module, ExtractedModule) and module.kept is not None:
                kept.setdefault(adapter.name, []).append(module.kept)
    for name, count in magnitudes.items():
        notes.append(
            f"{name}: the DoRA magnitudes of {count} weights are not measured, only their low-rank updates "
            "are"
        )
    for name, shares in kept.items():
        share = f"{sum(shares) / len(shares):.1%} of its difference to the base on average"
        notes.append(f"{name} is a full model: what is measured are factors that keep {share}")
    if changes:
        notes.append(
            f"{len(changes)} tensors that adapters trained directly (modules_to_save, biases, tokens, or a "
            f"full model's own), {changes[0]} among them, are not measured"
        )
    return notes


def _aligned(adapters: Sequence[Adapter]) -> Iterator[str]:
    """How far full models were from being aligned to the base."""
    for adapter in adapters:
        if adapter.aligned is not None:
            yield summary_of_alignment(adapter.aligned)
            yield from (f"{adapter.name}: {note}" for note in adapter.aligned.notes)


def short_names(names: Sequence[str], longest: int = 28) -> list[str]:
    """The last parts of each path, as many as tell it from the others; cut in the middle, and printable.

    >>> short_names(["runs/a/last", "runs/b/last", "math"])
    ['a/last', 'b/last', 'math']
    """
    parts = [[part for part in re.split(r"[/\\]", name) if part] or [name] for name in names]
    short = []
    for t, own in enumerate(parts):
        others = parts[:t] + parts[t + 1 :]
        count = next((k for k in range(1, len(own) + 1) if all(o[-k:] != own[-k:] for o in others)), len(own))
        short.append("/".join(own[-count:]))
    short = ["".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name) for name in short]
    half = longest // 2
    cut = [name if len(name) <= longest else f"{name[: half - 1]}…{name[-half:]}" for name in short]
    return [name if cut.count(name) == 1 else f"{t + 1} {name}" for t, name in enumerate(cut)]


def _shortened(places: Sequence[Place]) -> list[Place]:
    """The last part of each kind, where that names one kind only."""
    owners: dict[str, set[str]] = {}
    for place in places:
        owners.setdefault(place.kind.rpartition(".")[2], set()).add(place.kind)
    short = {kind: name if len(kinds) == 1 else kind for name, kinds in owners.items() for kind in kinds}
    return [Place(place.layer, short[place.kind]) for place in places]
