"""The table of spaces: names, parameters and the functions of `mergekit_tspa.spaces`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from mergekit_tspa.methods.inputs import Parameters
from mergekit_tspa.methods.method import DENSE, LARGEST_RANK, RANK_PARAMETER, SUM_OF_RANKS, ResultRank
from mergekit_tspa.methods.rules import Rule
from mergekit_tspa.spaces.basis import FULL
from mergekit_tspa.spaces.coordinates import Coordinates
from mergekit_tspa.spaces.core import core
from mergekit_tspa.spaces.ctm import ctm
from mergekit_tspa.spaces.factor import Factors
from mergekit_tspa.spaces.knots import knots
from mergekit_tspa.updates import LoraFactors


class CoreParameters(Parameters):
    balance: bool = Field(
        False,
        description=(
            "write every adapter with the singular factors of its update first, so that rules on entries "
            "do not depend on the factors it came in"
        ),
    )


class CtmParameters(Parameters):
    rank: int | None = Field(
        None,
        ge=1,
        description="rank of the shared subspaces and of the result; by default the largest of an adapter",
    )
    beta: float = Field(
        0.0, ge=0, le=1, description="0: all adapters count alike in the subspaces; 1: by their norm"
    )


@dataclass(frozen=True)
class Space:
    """One row of the table."""

    name: str
    title: str  # of a method, with its rule's title in the braces
    summary: str
    paper: str
    url: str
    coordinates: Callable[[Sequence[LoraFactors], Any], Coordinates]  # of updates, by the method's parameters
    result: ResultRank  # of entrywise rules
    parameters: type[Parameters] = Parameters
    isometric: bool = True  # the updates keep their sums and inner products, and come back as they were
    takes: Callable[[Rule], bool] = lambda rule: True
    split: str = "no"  # whether rules on entries depend on how an adapter splits its update into `B` and `A`
    scoped: bool = True  # one part, whose statistics can be taken over the whole model
    equal_ranks: bool = False  # needed of all adapters of a tensor
    counts_zeros: bool = (
        False  # rules count entries as if the adapters shared no directions; the rest are zeros
    )
    defaults: Mapping[str, Any] = field(default_factory=dict)  # where they differ from a rule's own
    remark: str = ""  # on a method's summary, with its rule's name in the braces

    @property
    def sized_by_rank(self) -> bool:
        """Whether `rank` is the size of the coordinates, and does not cut the merged update afterwards."""
        return self.result is RANK_PARAMETER


UPDATE_SPACES = (
    Space(
        name="lora",
        title="{}",
        summary="the updates `B A` themselves",
        paper="",
        url="",
        coordinates=lambda factors, p: FULL,
        result=DENSE,
    ),
    Space(
        name="knots",
        title="{} in KnOTS",
        summary="left singular basis of all updates side by side",
        paper="Stoica et al., 2024",
        url="https://arxiv.org/abs/2410.19735",
        coordinates=lambda factors, p: knots(factors),
        result=SUM_OF_RANKS,
    ),
    Space(
        name="core",
        title="{} in Core Space",
        summary="singular bases of the stacked factors",
        paper="Panariello et al., 2025",
        url="https://arxiv.org/abs/2509.17786",
        coordinates=lambda factors, p: core(factors, p.balance),
        result=SUM_OF_RANKS,
        parameters=CoreParameters,
        counts_zeros=True,
        split="yes; not with `balance: true`",
    ),
    Space(
        name="ctm",
        title="{} in Compress-then-Merge",
        summary="one pair of rank-`rank` subspaces for all updates, by HOOI",
        paper="He et al., ICML 2026",
        url="https://arxiv.org/abs/2606.03723",
        coordinates=lambda factors, p: ctm(factors, p.rank or max(f.rank for f in factors), p.beta),
        result=RANK_PARAMETER,
        parameters=CtmParameters,
        isometric=False,
    ),
)
FACTOR_SPACE = Space(
    name="factor",
    title="{} on factors",
    summary="all `B` and all `A` apart, as PEFT does; contains cross terms `B_t A_u`; equal ranks",
    paper="PEFT",
    url="https://huggingface.co/docs/peft/developer_guides/model_merging",
    coordinates=lambda factors, p: Factors(),
    result=LARGEST_RANK,
    isometric=False,
    takes=lambda rule: rule.on_factors,
    split="yes",
    scoped=False,
    equal_ranks=True,
    defaults={"convention": "peft"},
    remark="; `B` and `A` apart, as PEFT's `{}`; contains cross terms",
)
SPACES = (*UPDATE_SPACES, FACTOR_SPACE)
