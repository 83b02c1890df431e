"""From numbers to sentences: what is so, and what follows from it.

Advice is given only where merges of more than one set of adapters were measured, and what was measured says
so. Everything else is a fact, and the person who reads it decides.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from math import nan
from typing import NamedTuple

from torch import Tensor

from mergekit_tspa.insight.inspection import Inspection

FIGHT, AGREE = -0.1, 0.1  # cosines of two updates, below and above which something is said of them
CLEARLY = 1.05  # ratio of used ranks that is worth a word
LITTLE = 0.05  # share of the energy that cross terms may add or take away without a word
SHARED_START = 0.5  # overlap of row spaces above which adapters are taken to share their initial A
UNEQUAL = 1.5  # ratio of norms that is worth a word
# Methods that sum the factors apart.  On adapters that share their initial A each of them did worse than the
# base alone, on two sets of adapters: benchmarks/results/quality.md.
SUM_FACTORS = (
    "factor_linear",
    "factor_dare_linear",
    "factor_magnitude_prune",
    "rotation",
    "robustmerge_code",
    "tspa_pairwise",
)


class Finding(NamedTuple):
    """What is measured, and what follows from it, if anything does."""

    fact: str
    advice: str = ""

    @property
    def text(self) -> str:
        return f"{self.fact} {self.advice}".strip()


class Run(NamedTuple):
    """Neighbouring layers in which two updates of one kind of module point together or apart."""

    strength: float  # sum of |cosine|
    t: int
    u: int
    kind: str
    layers: list[int]
    cosine: float  # mean
    conflict: float  # mean share of opposite signs


def findings(ins: Inspection) -> list[Finding]:
    """About ten sentences, the most general first."""
    found = [*_sizes(ins), *_ranks(ins)]
    if len(ins.adapters) > 1:
        found += [*_meeting(ins), *_start(ins), *_sum(ins), *_pulls(ins)]
    if ins.merge:
        found += [*_survival(ins), *_stages(ins)]
    notes = [*ins.notes, *(ins.merge.notes if ins.merge else ())]
    return found + [Finding(f"{note}.") for note in notes]


def _sizes(ins: Inspection) -> Iterator[Finding]:
    weighted = (ins.measures.norm * ins.weights).square().nansum(0).sqrt().tolist()
    low, high = (weighted.index(end(weighted)) for end in (min, max))
    names, smallest, largest = ins.names, weighted[low], weighted[high]
    if len(names) == 1:
        yield Finding(
            f"{names[0]} has norm {largest:.3g} over {len(ins.tensors)} weights{_largest_kind(ins)}."
        )
    elif largest <= UNEQUAL * smallest:
        yield Finding(
            f"The {len(names)} adapters are of like size: norms {smallest:.3g} ({names[low]}) to "
            f"{largest:.3g} ({names[high]}), weights included."
        )
    else:
        ratio = f", {largest / smallest:.1f} times less" if smallest else ""
        yield Finding(
            f"{names[high]} is the largest, with norm {largest:.3g}, {names[low]} the smallest, with "
            f"{smallest:.3g}{ratio}, weights included."
        )


def _largest_kind(ins: Inspection) -> str:
    energy: dict[str, float] = {}
    for place, norm in zip(ins.places, ins.measures.norm[:, 0].tolist()):
        energy[place.kind] = energy.get(place.kind, 0.0) + norm**2
    kind, most = max(energy.items(), key=lambda item: item[1])
    return f", {most / sum(energy.values()):.0%} of its energy in {kind}" if len(energy) > 1 and most else ""


def _ranks(ins: Inspection) -> Iterator[Finding]:
    ranks = ins.measures.rank.where(ins.measures.rank > 0, nan)
    used = sorted(
        (effective / rank, name, effective, rank)
        for name, effective, rank in zip(
            ins.names, *(v.nanmean(0).tolist() for v in (ins.measures.effective_rank, ranks))
        )
        if rank == rank
    )
    if used:
        least, name, effective, rank = used[0]
        least = ", less of it than any other" if len(used) > 1 and used[1][0] > CLEARLY * least else ""
        yield Finding(
            f"{name} uses {effective:.1f} of its rank {rank:.3g} on average{least} (effective rank)."
        )


def _meeting(ins: Inspection) -> Iterator[Finding]:
    met = ins.of_pairs(ins.shared).any(0).tolist()
    apart = [pair for pair, meet in zip(ins.pairs, met) if not meet]
    if len(apart) == len(ins.pairs):
        yield Finding(
            f"No two of the {len(ins.names)} adapters share a weight (0 of {len(ins.tensors)}): nothing is "
            "compared, and they merge without touching each other."
        )
    elif apart:
        named = "; ".join(f"{ins.names[t]} and {ins.names[u]}" for t, u in apart[:3])
        yield Finding(
            f"{len(apart)} of {len(ins.pairs)} pairs share no weight: {named}{'; ..' * (len(apart) > 3)}."
        )


def _start(ins: Inspection) -> Iterator[Finding]:
    """Whether the adapters share their initial A."""
    inputs, outputs = ins.pair_means(ins.measures.overlap_in), ins.pair_means(ins.measures.overlap_out)
    if not inputs:
        return
    shared = [overlap for overlap in inputs.values() if overlap > SHARED_START]
    if not shared:
        read, written = (sum(overlaps.values()) / len(overlaps) for overlaps in (inputs, outputs))
        yield Finding(
            f"The adapters do not share an initial A: row spaces overlap by {read:.1%} (chance "
            f"{ins.chance():.1%}), column spaces by {written:.1%}."
        )
        return
    who = "All pairs" if len(shared) == len(inputs) else f"{len(shared)} of {len(inputs)} pairs"
    fact = (
        f"{who} read the same inputs, as after training from one initial A: row spaces overlap by "
        f"{sum(shared) / len(shared):.0%} (chance {ins.chance():.1%})."
    )
    growth = ins.growth_apart()
    grown = f"that makes {growth:.1f} times the norm of the sum here, and " if growth else ""
    measured = (
        f"{grown}on two such sets of adapters it did worse than the base alone "
        "(benchmarks/results/quality.md)."
    )
    if ins.merge is None:
        yield Finding(fact, f"Do not sum factors apart ({', '.join(SUM_FACTORS)}): {measured}")
    elif ins.merge.method in SUM_FACTORS:
        yield Finding(
            fact, f"Take another method than {ins.merge.method}, which sums factors apart: {measured}"
        )
    else:
        yield Finding(fact)


def _sum(ins: Inspection) -> Iterator[Finding]:
    ratio, cross = ins.total_interference()
    if cross != cross or not ins.of_pairs(ins.shared).any():
        return
    orthogonal = ratio / (1 + cross) ** 0.5
    fact = (
        f"||sum|| is {ratio:.0%} of the sum of norms, against {orthogonal:.0%} if the adapters were "
        "orthogonal"
    )
    if abs(cross) <= LITTLE:
        fact += f": over the whole model they neither add up nor cancel ({cross:+.2%} of energy)."
    elif cross > 0:
        fact += f": a plain sum counts what they share more than once ({cross:+.0%} of energy)."
    else:
        fact += f": in a plain sum they cancel ({cross:+.0%} of energy)."
    yield Finding(fact)


def _pulls(ins: Inspection) -> Iterator[Finding]:
    values = ins.of_pairs(ins.pulls)
    values = values[~values.isnan()]
    if not len(values):
        return
    fights, least = int((values < FIGHT).sum()), values.min().item()
    named: dict[tuple[int, int], Run] = {}
    for run in runs(ins, lambda cosine: cosine < FIGHT):
        named.setdefault((run.t, run.u), run)
    first = list(named.values())[:2]
    yield from (_fight(ins, run) for run in first)
    if not fights:
        yield Finding(
            f"No two adapters fight: the smallest cosine of {len(values)} meetings in a weight is "
            f"{least:.3f}."
        )
    elif fights > sum(len(run.layers) for run in first):
        yield Finding(
            f"{fights} of {len(values)} meetings in a weight are fights (cosine below {FIGHT}), the worst "
            f"{least:.2f}."
        )
    if together := runs(ins, lambda cosine: cosine > AGREE):
        run = together[0]
        yield Finding(
            f"{ins.names[run.t]} and {ins.names[run.u]} agree most, in {_where(run)}: mean cosine "
            f"{run.cosine:.2f}, sign conflict {run.conflict:.0%} (chance 50%)."
        )


def _fight(ins: Inspection, run: Run) -> Finding:
    """Two adapters that pull against each other, and what their weighted sum leaves of them there."""
    both = [run.t, run.u]
    rows = [i for i, p in enumerate(ins.places) if p.kind == run.kind and p.layer in run.layers]
    a = ins.weights[rows][:, both]
    inner = (ins.measures.inner[rows][:, both][:, :, both] * a[:, :, None] * a[:, None]).nansum(0)  # (2, 2)
    kept = (inner.sum(1) / inner.diagonal()).tolist()
    t, u = sorted(zip(kept, (ins.names[t] for t in both)))
    return Finding(
        f"{ins.names[run.t]} and {ins.names[run.u]} pull against each other in {_where(run)}: mean cosine "
        f"{run.cosine:.2f}, sign conflict {run.conflict:.0%} (chance 50%); a plain sum of the two keeps "
        f"{t[0]:.0%} of {t[1]} and {u[0]:.0%} of {u[1]} there."
    )


def runs(ins: Inspection, wanted: Callable[[Tensor], Tensor]) -> list[Run]:
    """Neighbouring layers in which the cosine of two adapters is as wanted, the strongest first."""
    found = []
    for t, u in ins.pairs:
        cosine, conflict = ins.grid(ins.pulls[:, t, u]), ins.grid(ins.measures.conflict[:, t, u])
        for kind, row, signs in zip(ins.kinds, cosine, conflict):
            for hit, group in groupby(enumerate(wanted(row).tolist()), key=lambda item: item[1]):
                where = [i for i, _ in group]
                if hit:
                    layers, mean = [ins.layers[i] for i in where], row[where].mean().item()
                    found.append(
                        Run(abs(mean) * len(where), t, u, kind, layers, mean, signs[where].nanmean().item())
                    )
    return sorted(found, reverse=True)


def _where(run: Run) -> str:
    low, high = run.layers[0], run.layers[-1]
    return f"layer {low} {run.kind}" if low == high else f"layers {low}-{high} {run.kind}"


def _survival(ins: Inspection) -> Iterator[Finding]:
    assert ins.merge is not None
    share, cosine = ins.total_survival()
    known = sorted((t for t, value in enumerate(share.tolist()) if value == value), key=lambda t: share[t])
    if not known:
        return
    low, high = known[0], known[-1]
    said = known if len(known) <= 8 else [low, high]
    listed = ", ".join(f"{ins.names[t]} {share[t]:.0%} (cosine {cosine[t]:.2f})" for t in said)
    yield Finding(f"{ins.merge.method} keeps {listed}.")


def _stages(ins: Inspection) -> Iterator[Finding]:
    said = [
        f"{s.name} {1 - s.end.sum() / s.start.sum():.1%} ({s.start.sum():.4g} to {s.end.sum():.4g}, mean "
        f"angle {s.angles.nanmean():.0f} degrees)"
        for s in ins.stages()
        if s.start.sum() > 0
    ]
    if said:
        yield Finding(f"TSPA lowers its objectives: {', '.join(said)}.")
