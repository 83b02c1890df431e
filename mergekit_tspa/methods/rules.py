"""The rules as the method table knows them: parameters, statistics and the function of a block."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mergekit_tspa.errors import InputError
from mergekit_tspa.methods.inputs import OneByOneParameters, Parameters
from mergekit_tspa.rules.emr import rescalers, unify
from mergekit_tspa.rules.linear import weighted_sum
from mergekit_tspa.rules.pcb import clamp_positions, clamped, pcb, score_positions, scores
from mergekit_tspa.rules.select import order_statistics
from mergekit_tspa.rules.sparsify import drop, kept_from, magnitude_drop, outlier_bounds, trim, trim_outliers
from mergekit_tspa.rules.spectral import cart, iso, tsv
from mergekit_tspa.rules.ties import elect_and_merge
from mergekit_tspa.updates import LoraFactors

# Entries of each update that an elementwise rule looks at in one go: few beside a weight, even of many adapters, on a
# CPU; many for a GPU, which would wait for the next call otherwise.
BLOCK = {"cpu": 2**16, "cuda": 2**22}
# One item a weight: the numbers of its adapters, their updates as factors `M_t = B_t A_t`, and their weights.
Streams = Callable[[], Iterable[tuple[Sequence[int], Sequence[LoraFactors], Sequence[float]]]]


# Parameters of rules


class Scoped(Parameters):
    scope: Literal["tensor", "model"] = Field(
        "tensor", description="take statistics over one weight, or over the whole model (a second pass)"
    )


class Density(OneByOneParameters):
    density: float = Field(0.2, gt=0, le=1, description="share of the entries that is kept")


class Election(OneByOneParameters):
    normalize: bool = Field(True, description="divide by the summed weights of the adapters that agree")
    elect: Literal["mass", "count"] = Field("mass", description="elect the sign of the sum, or of the sum of signs")
    take: Literal["mean", "max"] = Field("mean", description="combine what agrees, or take the largest entry")


class Random(OneByOneParameters):
    density: float = Field(0.5, gt=0, le=1, description="probability with which an entry is kept")
    rescale: bool = Field(True, description="divide what is kept by its probability")
    seed: int = Field(42, ge=0, lt=2**63, description="seed of the draws, which also depend on the names")


class TrimParameters(Density, Scoped):
    convention: Literal["paper", "peft", "mergekit"] = Field(
        "paper", description="which code to follow where they differ: entries a trim keeps, when weights come in"
    )


class TiesParameters(Election, TrimParameters):
    pass


class DareTiesParameters(Election, Random):
    pass


class DellaParameters(Election, Random):
    epsilon: float = Field(0.15, ge=0, lt=0.5, description="half the range of the keeping probabilities")

    @model_validator(mode="after")
    def _probabilities(self):
        if not 0 < self.density - self.epsilon <= self.density + self.epsilon < 1:
            raise ValueError(f"density {self.density:g} -+ epsilon {self.epsilon:g} must lie inside (0, 1)")
        return self


class BreadcrumbsParameters(OneByOneParameters):
    density: float = Field(0.9, gt=0, le=1, description="share of the entries that is kept")
    gamma: float = Field(0.01, ge=0, lt=1, description="share of the largest entries that is left out")


class TsvParameters(OneByOneParameters):
    rank_per_task: int | None = Field(None, ge=1, description="triplets kept per adapter; by default an equal share")
    orthogonalize: bool = Field(True, description="make the kept vectors orthogonal across adapters")


class IsoParameters(OneByOneParameters):
    common_fraction: float = Field(
        1.0, gt=0, le=1, description="share of the directions taken from the sum; below 1 this is Iso-CTS"
    )


class CartParameters(OneByOneParameters):
    share: float = Field(0.04, gt=0, le=1, description="share of the directions of each distance from the mean")
    inner: float = Field(0.1, allow_inf_nan=False, description="factor on those distances")


class PcbParameters(OneByOneParameters, Scoped):
    ratio: float = Field(0.1, gt=0, lt=1, description="share of the scores that counts")
    clamp: float = Field(1e-4, ge=0, lt=0.5, description="share of magnitudes clamped at either end")
    variant: Literal["invariant", "v1"] = Field(
        "invariant", description="agreement that ignores the updates' unit, or the authors' main script"
    )


@dataclass(frozen=True)
class Rule:
    """What to do with n matrices.

    `merge(M, weights, parameters, room)` for a rule that commutes with changes of basis, with the number of directions
    that there is room for; a linear one only changes the weights of the sum, `linear(weights)`.  An elementwise rule
    gets a block of rows of all matrices, `merge(M, weights, parameters, statistics, draw)`, where `draw()` gives
    uniform numbers, and `survey(streams, parameters)` its statistics per adapter.
    """

    name: str
    title: str
    summary: str
    paper: str
    url: str
    merge: Callable[..., Tensor] | None = None
    linear: Callable[[Tensor], Tensor] | None = None
    parameters: type[Parameters] = OneByOneParameters
    elementwise: bool = True
    survey: Callable[[Streams, Any], Tensor] | None = None
    check: Callable[[Sequence[Parameters]], None] = lambda parameters: None  # what a recipe cannot ask for
    records: bool = False  # the statistics, and more, are of use after the merge
    elects: bool = False
    random: bool = False


# Elementwise rules: statistics, then one function of a block


def _blocks(streams: Streams) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Row blocks of all updates, float32  # (n, rows, q)"""
    for numbers, coordinates, _ in streams():
        for _, M in row_blocks(coordinates):
            yield numbers, M


def row_blocks(coordinates: Sequence[LoraFactors]) -> Iterator[tuple[slice, Tensor]]:
    p, q = coordinates[0].shape
    step = max(1, BLOCK.get(coordinates[0].B.device.type, BLOCK["cpu"]) // q)
    for start in range(0, p, step):
        rows = slice(start, start + step)
        yield rows, torch.stack([(f.B[rows] @ f.A).float() for f in coordinates])


def _magnitudes(streams: Streams) -> Callable[[], Iterator]:
    return lambda: ((numbers, M.abs()) for numbers, M in _blocks(streams))


def _trim_survey(streams: Streams, p) -> Tensor:
    floor = p.convention != "paper"
    return order_statistics(_magnitudes(streams), lambda length: [kept_from(p.density, length, floor)])


def _ties(M, weights, p, thresholds, draw):
    return _elect(trim(M, thresholds), weights, p, p.convention == "peft")


def _elect(M, weights, p, weigh_after: bool = False):
    return elect_and_merge(M, weights, p.normalize, p.elect, p.take, weigh_after)


def _della(M, weights, p, _, draw):
    return _elect(magnitude_drop(M, p.density, p.epsilon, draw(), p.rescale), weights, p)


def _breadcrumbs_survey(streams: Streams, p) -> Tensor:
    return order_statistics(_magnitudes(streams), lambda length: outlier_bounds(p.density, p.gamma, length))


def _pcb_survey(streams: Streams, p) -> Tensor:
    """Bounds of magnitudes and of scores  # (n, 4)"""
    bounds = order_statistics(_magnitudes(streams), lambda length: clamp_positions(length, p.clamp))
    scored = lambda: (  # noqa: E731
        (numbers, scores(M, clamped(M, bounds[list(numbers)])[1], p.variant)) for numbers, M in _blocks(streams)
    )
    return torch.cat([bounds, order_statistics(scored, lambda length: score_positions(length, p.ratio))], dim=1)


def _emr_survey(streams: Streams, p) -> Tensor:
    """Scale of each task, from sums over weights of mean magnitudes  # (n, 1)"""
    sums: dict[int, Tensor] = {}
    for numbers, coordinates, weights in streams():
        size = math.prod(coordinates[0].shape)
        for _, M in row_blocks(coordinates):
            a = M.new_tensor(weights)
            uni, mask = unify(M, a)
            own, masked = a.abs() * M.abs().sum((1, 2)), (uni.abs() * mask).sum((1, 2))
            parts = torch.stack([own, masked]).double() / size  # (2, n)
            for number, part in zip(numbers, parts.mT):
                sums[number] = sums.get(number, 0) + part
    own, masked = torch.stack([sums[number] for number in range(len(sums))]).mT
    return rescalers(own, masked).float()[:, None]


def _check_no_svc(parameters: Sequence[Parameters]) -> None:
    if any(p.svc for p in parameters):
        raise InputError("svc after iso: all singular values are equal, so there are no directions to calibrate")


def _check_no_rank(parameters: Sequence[Parameters]) -> None:
    if any(p.rank for p in parameters):
        raise InputError("rank: a lower rank would no longer fit the masks of the tasks; use ctm_emr, or leave it out")


_DARE = {"paper": "Yu et al., 2023", "url": "https://arxiv.org/abs/2311.03099", "random": True}
_TIES = {"paper": "Yadav et al., 2023", "url": "https://arxiv.org/abs/2306.01708", "survey": _trim_survey}
RULES = (
    Rule(
        name="task_arithmetic",
        title="Task arithmetic",
        summary="weighted sum",
        paper="Ilharco et al., 2022",
        url="https://arxiv.org/abs/2212.04089",
        linear=lambda weights: weights,
        elementwise=False,
    ),
    Rule(
        name="mean",
        title="Mean",
        summary="weighted mean",
        paper="Wortsman et al., 2022",
        url="https://arxiv.org/abs/2203.05482",
        linear=lambda weights: weights / weights.sum(),
        elementwise=False,
    ),
    Rule(
        name="ties",
        title="TIES",
        summary="trim each update, elect a sign per entry, average what agrees",
        merge=_ties,
        parameters=TiesParameters,
        elects=True,
        **_TIES,
    ),
    Rule(
        name="magnitude_prune",
        title="Magnitude pruning",
        summary="trim each update, weighted sum",
        merge=lambda M, weights, p, thresholds, draw: weighted_sum(trim(M, thresholds), weights),
        parameters=TrimParameters,
        **_TIES,
    ),
    Rule(
        name="dare_linear",
        title="DARE",
        summary="drop entries at random and rescale, weighted sum",
        merge=lambda M, weights, p, _, draw: weighted_sum(drop(M, p.density, draw(), p.rescale), weights),
        parameters=Random,
        **_DARE,
    ),
    Rule(
        name="dare_ties",
        title="DARE-TIES",
        summary="drop entries at random and rescale, elect a sign per entry, average what agrees",
        merge=lambda M, weights, p, _, draw: _elect(drop(M, p.density, draw(), p.rescale), weights, p),
        parameters=DareTiesParameters,
        elects=True,
        **_DARE,
    ),
    Rule(
        name="della",
        title="DELLA",
        summary="drop small entries with a higher probability and rescale, elect, average what agrees",
        paper="Deep et al., 2024",
        url="https://arxiv.org/abs/2406.11617",
        merge=_della,
        parameters=DellaParameters,
        elects=True,
        random=True,
    ),
    Rule(
        name="breadcrumbs",
        title="Model Breadcrumbs",
        summary="leave out the smallest and the very largest entries, weighted sum",
        paper="Davari & Belilovsky, 2023",
        url="https://arxiv.org/abs/2312.06795",
        merge=lambda M, weights, p, bounds, draw: weighted_sum(trim_outliers(M, *bounds.mT), weights),
        parameters=BreadcrumbsParameters,
        survey=_breadcrumbs_survey,
    ),
    Rule(
        name="tsv",
        title="TSV",
        summary="leading singular triplets of each update, made orthogonal across updates",
        paper="Gargiulo et al., 2024",
        url="https://arxiv.org/abs/2412.00081",
        merge=lambda M, weights, p, room: tsv(M, weights, p.rank_per_task, p.orthogonalize, room),
        parameters=TsvParameters,
        elementwise=False,
    ),
    Rule(
        name="iso",
        title="Iso",
        summary="weighted sum with equal singular values",
        check=_check_no_svc,
        paper="Marczak et al., 2025",
        url="https://arxiv.org/abs/2502.04959",
        merge=lambda M, weights, p, room: iso(M, weights, p.common_fraction, room),
        parameters=IsoParameters,
        elementwise=False,
    ),
    Rule(
        name="cart",
        title="CART",
        summary="mean, and leading directions of the distances from it",
        paper="Choi et al., 2024",
        url="https://arxiv.org/abs/2412.12153",
        merge=lambda M, weights, p, room: cart(M, weights, p.share, p.inner, room),
        parameters=CartParameters,
        elementwise=False,
    ),
    Rule(
        name="pcb",
        title="PCB-Merging",
        summary="entries weighted by magnitude and agreement, low scores dropped",
        paper="Du et al., 2024",
        url="https://arxiv.org/abs/2410.02396",
        merge=lambda M, weights, p, bounds, draw: pcb(M, weights, bounds[:, :2], bounds[:, 2:], p.variant),
        parameters=PcbParameters,
        survey=_pcb_survey,
    ),
    Rule(
        name="emr",
        title="EMR-Merging",
        summary="largest entry of the elected sign; masks and scales per task are written beside the model",
        check=_check_no_rank,
        paper="Huang et al., 2024",
        url="https://arxiv.org/abs/2405.17461",
        merge=lambda M, weights, p, _, draw: unify(M, weights)[0],
        parameters=Scoped,
        survey=_emr_survey,
        records=True,
        elects=True,
    ),
)
