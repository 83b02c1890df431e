"""The table of rules: names, parameters and the functions of `mergekit_tspa.rules`."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from mergekit_tspa.methods.inputs import OneByOneParameters, Parameters
from mergekit_tspa.rules.breadcrumbs import breadcrumbs, magnitude_range
from mergekit_tspa.rules.dare import dare_linear, dare_ties
from mergekit_tspa.rules.della import della
from mergekit_tspa.rules.emr import emr, task_scales
from mergekit_tspa.rules.linear import mean, shares, task_arithmetic, unchanged
from mergekit_tspa.rules.pcb import pcb, pcb_bounds
from mergekit_tspa.rules.prune import magnitude_prune, trim_thresholds
from mergekit_tspa.rules.rule_kinds import Entrywise, Linear, Spectral
from mergekit_tspa.rules.spectral import cart, iso, tsv
from mergekit_tspa.rules.ties import ties, ties_statistics


class Density(OneByOneParameters):
    density: float = Field(0.2, gt=0, le=1, description="share of the entries that is kept")


class Election(OneByOneParameters):
    normalize: bool = Field(True, description="divide by the summed weights of the adapters that agree")
    elect: Literal["mass", "count"] = Field(
        "mass", description="elect the sign of the sum, or of the sum of signs"
    )
    take: Literal["mean", "max"] = Field("mean", description="combine what agrees, or take the largest entry")


class Random(OneByOneParameters):
    density: float = Field(0.5, gt=0, le=1, description="probability with which an entry is kept")
    rescale: bool = Field(
        True,
        description="divide what is kept by its probability, as PEFT does from 0.19 on; false: as before",
    )
    seed: int = Field(42, ge=0, lt=2**63, description="seed of the draws, which also depend on the names")


class TrimParameters(Density):
    convention: Literal["paper", "peft", "mergekit"] = Field(
        "paper",
        description="which code to follow where they differ: entries a trim keeps, when weights come in",
    )


class TiesParameters(Election, TrimParameters):
    pass


class DareTiesParameters(Election, Random):
    pass


class DellaParameters(Election, Random):
    epsilon: float = Field(0.15, ge=0, lt=0.5, description="half the range of the keeping probabilities")

    @model_validator(mode="after")
    def _probabilities(self) -> "DellaParameters":
        if not 0 < self.density - self.epsilon <= self.density + self.epsilon < 1:
            raise ValueError(f"density {self.density:g} -+ epsilon {self.epsilon:g} must lie inside (0, 1)")
        return self


class BreadcrumbsParameters(OneByOneParameters):
    density: float = Field(0.9, gt=0, le=1, description="share of the entries that is kept")
    gamma: float = Field(0.01, ge=0, lt=1, description="share of the largest entries that is left out")


class TsvParameters(OneByOneParameters):
    rank_per_task: int | None = Field(
        None, ge=1, description="triplets kept per adapter; by default an equal share"
    )
    orthogonalize: bool = Field(True, description="make the kept vectors orthogonal across adapters")


class IsoParameters(OneByOneParameters):
    common_fraction: float = Field(
        1.0, gt=0, le=1, description="share of the directions taken from the sum; below 1 this is Iso-CTS"
    )


class CartParameters(OneByOneParameters):
    share: float = Field(
        0.04, gt=0, le=1, description="share of the directions of each distance from the mean"
    )
    inner: float = Field(0.1, allow_inf_nan=False, description="factor on those distances")


class PcbParameters(OneByOneParameters):
    ratio: float = Field(0.1, gt=0, lt=1, description="share of the scores that counts")
    clamp: float = Field(1e-4, ge=0, lt=0.5, description="share of magnitudes clamped at either end")
    variant: Literal["invariant", "v1"] = Field(
        "invariant", description="agreement that ignores the updates' unit, or the authors' main script"
    )


class Scoped(Parameters):
    scope: Literal["tensor", "model"] = Field(
        "tensor", description="take statistics over each tensor, or over the whole model (a second pass)"
    )


@dataclass(frozen=True)
class Rule:
    """One row of the table."""

    name: str
    title: str
    summary: str
    paper: str
    url: str
    kind: Linear | Spectral | Entrywise
    parameters: type[Parameters] = OneByOneParameters
    weight: str = "linear"  # what an adapter's coefficient does, as the method table shows it
    scoped: bool = False  # its statistics can be taken over the whole model
    elects: bool = False  # lets the adapters vote on signs
    flat: bool = False  # its result has equal singular values
    on_factors: bool = False  # is published for `B` and `A` apart, too

    def own(self, parameters: Parameters) -> dict[str, Any]:
        """Of a method's parameters those that the rule's function takes."""
        names = [name for name in self.parameters.model_fields if name not in _NOT_OF_RULES]
        return {name: getattr(parameters, name) for name in names}

    @property
    def recorded(self) -> bool:
        """Whether something of each adapter is kept beside the merged update."""
        return isinstance(self.kind, Entrywise) and self.kind.recorded is not None


# `seed` becomes draws before a rule is called.
_NOT_OF_RULES = {"seed", *OneByOneParameters.model_fields}
_SHARE = "share of a mean"
_AGREEING = "normalised by the weights that agree; linear with `normalize: false`"
_TIES: dict[str, Any] = {"paper": "Yadav et al., 2023", "url": "https://arxiv.org/abs/2306.01708"}
_DARE: dict[str, Any] = {"paper": "Yu et al., 2023", "url": "https://arxiv.org/abs/2311.03099"}
RULES = (
    Rule(
        name="task_arithmetic",
        title="Task arithmetic",
        summary="weighted sum",
        paper="Ilharco et al., 2022",
        url="https://arxiv.org/abs/2212.04089",
        kind=Linear(task_arithmetic, coefficients=unchanged),
    ),
    Rule(
        name="mean",
        title="Mean",
        summary="weighted mean",
        paper="Wortsman et al., 2022",
        url="https://arxiv.org/abs/2203.05482",
        kind=Linear(mean, coefficients=shares),
        weight=_SHARE,
    ),
    Rule(
        name="ties",
        title="TIES",
        summary="trim each update, elect a sign per entry, average what agrees",
        kind=Entrywise(ties, ties_statistics),
        parameters=TiesParameters,
        weight=f"{_AGREEING} or `convention: peft`",
        scoped=True,
        elects=True,
        on_factors=True,
        **_TIES,
    ),
    Rule(
        name="magnitude_prune",
        title="Magnitude pruning",
        summary="trim each update, weighted sum",
        kind=Entrywise(magnitude_prune, trim_thresholds),
        parameters=TrimParameters,
        scoped=True,
        on_factors=True,
        **_TIES,
    ),
    Rule(
        name="dare_linear",
        title="DARE",
        summary="drop entries at random and rescale, weighted sum",
        kind=Entrywise(dare_linear, random=True),
        parameters=Random,
        on_factors=True,
        **_DARE,
    ),
    Rule(
        name="dare_ties",
        title="DARE-TIES",
        summary="drop entries at random and rescale, elect a sign per entry, average what agrees",
        kind=Entrywise(dare_ties, random=True),
        parameters=DareTiesParameters,
        weight=_AGREEING,
        elects=True,
        on_factors=True,
        **_DARE,
    ),
    Rule(
        name="della",
        title="DELLA",
        summary="drop small entries with a higher probability and rescale, elect, average what agrees",
        paper="Deep et al., 2024",
        url="https://arxiv.org/abs/2406.11617",
        kind=Entrywise(della, random=True),
        parameters=DellaParameters,
        weight=_AGREEING,
        elects=True,
    ),
    Rule(
        name="breadcrumbs",
        title="Model Breadcrumbs",
        summary="leave out the smallest and the very largest entries, weighted sum",
        paper="Davari & Belilovsky, 2023",
        url="https://arxiv.org/abs/2312.06795",
        kind=Entrywise(breadcrumbs, magnitude_range),
        parameters=BreadcrumbsParameters,
    ),
    Rule(
        name="tsv",
        title="TSV",
        summary="leading singular triplets of each update, made orthogonal across updates",
        paper="Gargiulo et al., 2024",
        url="https://arxiv.org/abs/2412.00081",
        kind=Spectral(tsv),
        parameters=TsvParameters,
    ),
    Rule(
        name="iso",
        title="Iso",
        summary="weighted sum with equal singular values",
        paper="Marczak et al., 2025",
        url="https://arxiv.org/abs/2502.04959",
        kind=Spectral(iso),
        parameters=IsoParameters,
        flat=True,
    ),
    Rule(
        name="cart",
        title="CART",
        summary="mean, and leading directions of the distances from it",
        paper="Choi et al., 2024",
        url="https://arxiv.org/abs/2412.12153",
        kind=Spectral(cart),
        parameters=CartParameters,
        weight=_SHARE,
    ),
    Rule(
        name="pcb",
        title="PCB-Merging",
        summary="entries weighted by magnitude and agreement, low scores dropped",
        paper="Du et al., 2024",
        url="https://arxiv.org/abs/2410.02396",
        kind=Entrywise(pcb, pcb_bounds),
        parameters=PcbParameters,
        scoped=True,
    ),
    Rule(
        name="emr",
        title="EMR-Merging",
        summary="largest entry of the elected sign; masks and scales per task are written beside the model",
        paper="Huang et al., 2024",
        url="https://arxiv.org/abs/2405.17461",
        kind=Entrywise(emr, recorded=task_scales),
        parameters=Parameters,  # masks fit the updates as they are, without Pico and SVC
        scoped=True,
        elects=True,
    ),
)
