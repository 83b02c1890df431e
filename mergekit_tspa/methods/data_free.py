"""The regression family without texts: the updates themselves stand for the inputs that they were trained on.

Each rule is a function of `mergekit_tspa.rules`.  Those that are the same in every orthonormal basis run on
cores; TACT and WUDI depend on the basis and form the updates in full size.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mergekit_tspa.methods.inputs import OneByOneParameters, TensorInputs
from mergekit_tspa.methods.method import DENSE, SUM_OF_RANKS, Method, OneByOne
from mergekit_tspa.rules.ace import ace
from mergekit_tspa.rules.actmat import actmat, tact
from mergekit_tspa.rules.dc_merge import dc_merge
from mergekit_tspa.rules.optmerge import optmerge
from mergekit_tspa.rules.wudi import swudi, swudi_a, wudi
from mergekit_tspa.spaces.core import core
from mergekit_tspa.updates import Dense, LoraFactors, Spanned

Start = Literal["sum", "mean"]


class ActmatParameters(OneByOneParameters):
    ridge: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="keeps weak directions small; 0: pseudo-inverse"
    )
    shrink_to: Literal["mean", "zero"] = Field(
        "mean", description="what the ridge leads to; with `mean` an adapter alone is itself"
    )


class TactParameters(ActmatParameters):
    density: float = Field(0.5, gt=0, le=1, description="share of the entries that stand for the inputs")


class WudiParameters(OneByOneParameters):
    steps: int = Field(300, ge=0, description="steps of Adam from the sum of the updates")
    rate: float = Field(1e-5, gt=0, allow_inf_nan=False, description="about how far an entry moves in a step")


class SwudiParameters(OneByOneParameters):
    time: float = Field(300.0, ge=0, allow_inf_nan=False, description="how long the gradient flow goes on")
    share: float | None = Field(
        None, gt=0, le=1, description="share of the directions that it moves; by default all"
    )
    start: Start = Field("sum", description="what the flow starts from")


class SwudiAParameters(OneByOneParameters):
    select: Literal["participation", "entropy"] = Field(
        "participation", description="how the directions of weight are counted"
    )
    start: Start = Field("sum", description="what the other directions keep")


class OptmergeParameters(OneByOneParameters):
    steps: int = Field(300, ge=0, description="steps of the descent from the mean of the updates")
    rate: float = Field(1e-4, gt=0, lt=1, description="its learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="its momentum")


class DcMergeParameters(OneByOneParameters):
    smoothing: Literal["average", "linear", "none"] = Field(
        "average", description="how the singular values of each update are evened out"
    )
    ratio: float = Field(5.0, ge=1, allow_inf_nan=False, description="for `linear`, of the first to the last")
    keep: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of each update's entries that stay; by default as many as it has directions",
    )
    rank_per_task: int | None = Field(
        None, ge=1, description="directions of an adapter that count; by default all, or an equal share"
    )


class AceParameters(OneByOneParameters):
    ridge: float = Field(1e-2, gt=0, allow_inf_nan=False, description="in the unit of the squared norms")
    spread: float = Field(0.3, ge=0, description="above which the adapters' sizes are taken to differ")
    isotropic: float = Field(0.3, ge=0, le=1, description="share of the directions of the part added then")
    published: bool = Field(
        False, description="as the authors' code, by which an adapter alone does not come back as itself"
    )


def on_cores(rule: Callable[..., Tensor], *sizes: str) -> Callable[[TensorInputs], Spanned]:
    """A rule on the updates in the coordinates of Core Space.

    Args:
        rule: the same in every orthonormal basis
        sizes: what it wants to know of the tensor itself, `columns` or `room`, the smaller side
    """

    def merge(w: TensorInputs) -> Spanned:
        basis = core(w.factors)
        (part,) = basis.parts(w.factors, w.weights)
        M = torch.stack([f.dense() for f in part.factors])
        shape = w.factors[0].shape
        known = {"columns": shape[1], "room": min(shape)}
        merged = rule(M, M.new_tensor(w.weights), **{s: known[s] for s in sizes}, **_own(w))
        joined = basis.joined([merged])
        assert isinstance(joined, Spanned)  # Core Space has a basis on both sides
        return joined

    return merge


def in_full(rule: Callable[..., Tensor]) -> Callable[[TensorInputs], Dense]:
    """A rule on the updates in full size."""

    def merge(w: TensorInputs) -> Dense:
        M = torch.stack([f.dense() for f in w.factors])  # (n, d_out, d_in)
        return Dense(rule(M, M.new_tensor(w.weights), **_own(w)))

    return merge


def merge_by_ace(w: TensorInputs) -> LoraFactors:
    B, A = zip(*w.factors)
    Q, X = ace(B, A, torch.tensor(w.weights, device=B[0].device), **_own(w))
    return LoraFactors(Q.to(B[0]), X.to(A[0]))


def _own(w: TensorInputs) -> dict[str, Any]:
    assert isinstance(w.parameters, OneByOneParameters)
    return w.parameters.own()


_ACTMAT: dict[str, Any] = {
    "paper": "Model Merging via Data-Free Covariance Estimation, 2026",
    "url": "https://arxiv.org/abs/2604.01329",
}
_SWUDI: dict[str, Any] = {
    "paper": "Closed-Form Spectral Regularization for Multi-Task Model Merging, 2026",
    "url": "https://arxiv.org/abs/2606.07289",
}
DATA_FREE_METHODS = (
    Method(
        name="actmat",
        title="ACTMat",
        summary="RegMean with the updates themselves in place of texts",
        result=SUM_OF_RANKS,
        merge=OneByOne(on_cores(actmat)),
        parameters=ActmatParameters,
        **_ACTMAT,
    ),
    Method(
        name="tact",
        title="TACT",
        summary="ACTMat on each update's largest entries",
        result=DENSE,
        merge=OneByOne(in_full(tact)),
        parameters=TactParameters,
        **_ACTMAT,
    ),
    Method(
        name="wudi",
        title="WUDI",
        summary="from the sum, steps that disturb each update less on its own rows",
        paper="Cheng et al., 2025",
        url="https://arxiv.org/abs/2503.08099",
        result=DENSE,
        merge=OneByOne(in_full(wudi)),
        parameters=WudiParameters,
    ),
    Method(
        name="swudi",
        title="SWUDI",
        summary="the gradient flow of WUDI's loss in closed form",
        result=SUM_OF_RANKS,
        merge=OneByOne(on_cores(swudi, "columns")),
        parameters=SwudiParameters,
        **_SWUDI,
    ),
    Method(
        name="swudi_a",
        title="SWUDI-A",
        summary="the solution of WUDI's loss in the directions of weight, the sum elsewhere",
        result=SUM_OF_RANKS,
        merge=OneByOne(on_cores(swudi_a, "columns")),
        parameters=SwudiAParameters,
        **_SWUDI,
    ),
    Method(
        name="optmerge",
        title="OptMerge",
        summary="from the mean, descent on WUDI's loss with each update cut to its share of directions",
        paper="Wei et al., 2025",
        url="https://arxiv.org/abs/2505.19892",
        result=SUM_OF_RANKS,
        merge=OneByOne(on_cores(optmerge, "room")),
        parameters=OptmergeParameters,
    ),
    Method(
        name="dc_merge",
        title="DC-Merge",
        summary="even out each spectrum, merge in singular vectors that no two updates share",
        paper="Zhang et al., 2026",
        url="https://arxiv.org/abs/2603.06242",
        result=SUM_OF_RANKS,
        merge=OneByOne(on_cores(dc_merge, "room")),
        parameters=DcMergeParameters,
    ),
    Method(
        name="ace",
        title="ACE-Merging",
        summary="RegMean with the covariance of each update's rows in place of texts",
        paper="ACE-Merging, 2026",
        url="https://arxiv.org/abs/2603.02945",
        result=SUM_OF_RANKS,
        merge=OneByOne(merge_by_ace),
        parameters=AceParameters,
    ),
)
