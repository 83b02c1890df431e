"""LoRA-LEGO (arXiv 2409.16167): the rank-one units of all adapters are clustered, a merged unit per
cluster.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from mergekit_tspa.errors import InputError
from mergekit_tspa.methods.inputs import OneByOneParameters, Planned
from mergekit_tspa.methods.method import Method, OneByOne, ResultRank
from mergekit_tspa.updates import LoraFactors, LowRank, nonzero


class LegoParameters(OneByOneParameters):
    clusters: int | None = Field(
        None, ge=1, description="units of the merged update; the largest rank by default"
    )
    gauge: Literal["balanced", "raw"] = Field(
        "balanced",
        description="units are singular triplets of each update, or columns and rows of its factors",
    )
    seed: int = Field(
        42, ge=0, lt=2**63, description="seed of the choice of units that clustering starts from"
    )


def lora_lego(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    *,
    clusters: int | None = None,
    gauge: Literal["balanced", "raw"] = "balanced",
    generator: torch.Generator,
) -> LoraFactors:
    """A unit per cluster, `mean(u) * mean ||u||_inf / ||mean(u)||_inf` over its units `u = [A_t[i,:],
    B_t[:,i]]`.

    The whole is scaled by `sqrt(r / K)`.  Clusters are those of k-means on units with both halves normalised.
     Follows the re-implementation wooseong97/TARA-Merge, as the authors published no code, but for `balanced`
     units, which do
    not depend on how an update is split between its factors, and for the order of the adapters, that of their
    norms.
    """
    adapters = sorted((factors[t].scaled(weights[t]) for t in nonzero(factors)), key=LoraFactors.norm)
    if gauge == "balanced":
        adapters = [_balanced(f) for f in adapters]
    r = max(f.rank for f in adapters)
    A, Bt = torch.cat([f.A for f in adapters]), torch.cat([f.B.mT for f in adapters])  # (R, d_in), (R, d_out)
    K = min(clusters or r, len(A))
    features = torch.cat([normalize(A.double()), normalize(Bt.double())], dim=1)  # (R, d_in + d_out)
    start = torch.randperm(len(A), generator=generator, device=generator.device)[:K]
    member = one_hot(k_means(features, start), K).to(A.dtype)  # (R, K)
    member = member[:, member.any(0)]  # clusters may end empty

    units = torch.cat([A, Bt], dim=1)
    average = member / member.sum(0)
    mean = average.mT @ units  # (K, d_in + d_out)
    size, peak = average.mT @ units.abs().amax(1), mean.abs().amax(1)  # (K,)
    scale = torch.where(peak > 1e-6 * size, size / peak, 0)  # units that cancel leave rounding noise
    A, Bt = ((r / K) ** 0.25 * scale[:, None] * mean).split([A.shape[1], Bt.shape[1]], dim=1)
    return LoraFactors(Bt.mT, A)


def k_means(X: Tensor, start: Tensor, steps: int = 10) -> Tensor:
    """Lloyd's labels (R,) of the rows of X (R, d), from the rows `start` (K,); an empty cluster keeps its
    centre.

    Orthogonal units of one adapter are equally far from each other: ties go to the first cluster, not to
    rounding.
    """
    centres = X[start]
    for _ in range(steps):
        distance = centres.square().sum(1) - 2 * X @ centres.mT  # (R, K), squared, less the norms of X
        labels = distance.round(decimals=9).argmin(1)
        member = one_hot(labels, len(start)).to(X.dtype)
        count = member.sum(0)[:, None]
        centres = torch.where(count > 0, member.mT @ X / count, centres)
    return labels


def _balanced(f: LoraFactors) -> LoraFactors:
    """Singular triplets above rounding, of the sign that makes the largest entry of each row of `V^T`
    positive.
    """
    U, S, Vh = LowRank(*f).svd()
    k = int((S >= 1e-12 * S[0]).sum())
    sign = Vh[:k].gather(1, Vh[:k].abs().argmax(1, keepdim=True)).sign()  # (k, 1)
    return LowRank(*f).rebuilt(U[:, :k] * sign.mT, S[:k], sign * Vh[:k])


def _check_clusters(plans: Sequence[Planned]) -> None:
    """Weights that fewer adapters touch may have fewer units; at least one must have as many as asked for."""
    asked = [plan for plan in plans if plan.parameters.clusters is not None]
    units = max((sum(plan.ranks) for plan in asked), default=0)
    if asked and min(plan.parameters.clusters for plan in asked) > units:
        raise InputError(
            f"clusters {asked[0].parameters.clusters}: the adapters have {units} rank-one units for a "
            f"weight at most ({asked[0].name}); ask for no more, or leave it out"
        )


CLUSTERS = ResultRank("clusters", lambda ranks, p: sum(ranks), exact=False)
lora_lego_method = Method(
    name="lora_lego",
    title="LoRA-LEGO",
    summary="rank-one units of all adapters clustered by k-means, a merged unit per cluster",
    paper="Zhao et al., 2024",
    url="https://arxiv.org/abs/2409.16167",
    result=CLUSTERS,
    split="no, unless rounding decides between equally near clusters; with `gauge: raw` yes",
    merge=OneByOne(
        lambda w: lora_lego(
            w.factors,
            w.weights,
            clusters=w.parameters.clusters,
            gauge=w.parameters.gauge,
            generator=w.generator(w.parameters.seed),
        )
    ),
    parameters=LegoParameters,
    check=_check_clusters,
)
