"""Rotation matching: every adapter's factors are turned towards those of one adapter, then summed."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from mergekit_tspa.alignment.procrustes import match
from mergekit_tspa.methods.factor_linear import factor_linear
from mergekit_tspa.methods.inputs import OneByOneParameters
from mergekit_tspa.methods.method import LARGEST_RANK, Method, OneByOne
from mergekit_tspa.spaces.factor import encode
from mergekit_tspa.updates import LoraFactors, nonzero


class RotationParameters(OneByOneParameters):
    scale: bool = Field(False, description="also scale the factors of each adapter against each other")


def rotation(factors: Sequence[LoraFactors], weights: Sequence[float], *, scale: bool = False) -> LoraFactors:
    """`factor_linear` of `(B_t R_t, R_t^T A_t)`, with the R_t that brings `[B_t; A_t^T]` nearest to `[B_0;
    A_0^T]`.

    The anchor 0 is the adapter whose update is nearest to the mean update.  Zhang et al. match the attention
    heads of whole models in this way.  This is their matching applied to the rotation symmetry of LoRA
    factors: an adapter's heads cannot be turned against a base that stays as it is, but `B_t A_t` does not
        change with R_t.  Only the cross
    terms of the summed factors do.
    """
    live = nonzero(factors)
    B, A = (x.double() for x in encode([factors[t] for t in live]))  # (n, d_out, r), (n, r, d_in)
    X_0, Y_0 = (x[_anchor(B, A)] for x in (B.mT, A))
    X, Y = match(B.mT, A, X_0, Y_0, scale)
    turned = [LoraFactors(x.mT, y).to(factors[0].B.dtype) for x, y in zip(X, Y)]
    return factor_linear(turned, [weights[t] for t in live])


def _anchor(B: Tensor, A: Tensor) -> Tensor:
    """The index t of the least `||D_t - mean_u D_u||`, of two equally near ones the larger update."""
    G = (torch.einsum("tdi,udj->tuij", B, B) * torch.einsum("tie,uje->tuij", A, A)).sum((2, 3))  # <D_t, D_u>
    distance = G.diagonal() - 2 * G.mean(1)  # squared, less ||mean||^2
    tied = distance <= distance.min() + 1e-9 * G.diagonal().max()
    return G.diagonal().where(tied, -torch.inf).argmax()


rotation_method = Method(
    name="rotation",
    title="Rotation matching",
    summary="factors of each adapter turned towards one adapter's, then summed; contains cross terms",
    paper="after Zhang et al., 2025",
    url="https://arxiv.org/abs/2502.00264",
    result=LARGEST_RANK,
    split="yes, rotations apart",
    merge=OneByOne(lambda w: rotation(w.factors, w.weights, **w.parameters.own())),
    parameters=RotationParameters,
)
