"""Fisher merging: every entry a mean, weighted by how much each adapter's loss on its texts depends on it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mergekit_tspa.calibration.gradients import squared_gradients
from mergekit_tspa.calibration.readings import Readings
from mergekit_tspa.errors import InputError
from mergekit_tspa.methods.inputs import Pair, Progress, TensorInputs
from mergekit_tspa.methods.method import DENSE, Merged, Method, Passes
from mergekit_tspa.methods.texts import Length, TextParameters, length_of, text_parameters
from mergekit_tspa.rules.fisher import fisher, fisher_rank_one
from mergekit_tspa.updates import Dense

EXACT_UP_TO = 2**31  # bytes of all F together
LENGTH = "\0"  # where the survey has `lambda`; no tensor has this name
SEARCHED_RANK = 64


class FisherParameters(TextParameters):
    lambda_: Length = Field(
        1.0, alias="lambda", description="factor on the merged update; `auto`: found by the texts"
    )
    rank: int | None = Field(
        None, ge=1, description="reduce merged updates of a higher rank to this one, by SVD"
    )
    exact: bool | Literal["auto"] = Field(
        "auto", description="entry by entry, or from the sides of the gradients; `auto`: exact up to 2 GiB"
    )


def measure_fisher(inputs: Sequence[TensorInputs], readings: Readings) -> Mapping[str, Mapping[str, Tensor]]:
    """What each adapter's loss depends on, by tensor; small where it is not exact."""
    p = text_parameters(inputs)
    assert isinstance(p, FisherParameters)
    size = sum(4 * len(w.factors) * w.factors[0].shape[0] * w.factors[0].shape[1] for w in inputs)
    exact = size <= EXACT_UP_TO if p.exact == "auto" else bool(p.exact)
    found = squared_gradients(
        readings.singles, readings.written, exact, readings.how.batch_tokens, readings.progress
    )
    survey = {}
    for w in inputs:
        own = [found[adapter.name].get(w.name) for adapter in w.adapters]
        known = [one for one in own if one is not None]
        if len(known) < len(own):
            raise InputError(f"{w.name}: the loss of an adapter's texts does not depend on it")
        survey[w.name] = {
            "outputs": torch.stack([one.outputs for one in known]),
            "inputs": torch.stack([one.inputs for one in known]),
        } | ({"F": torch.stack([one.F for one in known if one.F is not None])} if exact else {})
    return survey | {LENGTH: {"lambda": torch.tensor(_length(inputs, survey, p, readings))}}


def gradients_of(p: FisherParameters) -> Callable[[int, int], int]:
    """How many numbers the squared gradients of one tensor and adapter are."""
    if p.exact is False:
        return lambda d_out, d_in: d_out + d_in
    return lambda d_out, d_in: d_out * d_in


def _length(
    inputs: Sequence[TensorInputs],
    survey: Mapping[str, Mapping[str, Tensor]],
    p: FisherParameters,
    readings: Readings,
) -> float:
    """`lambda`; the search sets the merge beside the base at the result's rank, or at one near the whole."""
    if not isinstance(p.lambda_, str):
        return p.lambda_
    rank = p.rank or SEARCHED_RANK
    updates = {w.name: Dense(fisher_tensor(w, survey[w.name])).truncated(rank) for w in inputs}
    return length_of(updates, p, readings)


def merge_fisher(inputs: Sequence[TensorInputs], pairs: Sequence[Pair], progress: Progress) -> Merged:
    updates = []
    for i, w in enumerate(inputs):
        progress("merging", i / len(inputs), None)
        if w.survey is None:
            raise InputError(f"{w.name}: nothing was read of it")
        length = float(w.survey[LENGTH]["lambda"])
        updates.append(Dense(fisher_tensor(w, w.survey[w.name])).scaled(length))
    return Merged([*updates], [])


def fisher_tensor(w: TensorInputs, found: Mapping[str, Tensor]) -> Tensor:
    """`fisher` or `fisher_rank_one`, relative to the mean of `F`, whose unit is that of the loss."""
    factors = [(f.A.mT, f.B.mT) if w.transposed else f for f in w.factors]
    B, A = zip(*factors)
    a = torch.tensor(w.weights, dtype=torch.float64, device=B[0].device)
    if "F" in found:
        F = found["F"].to(B[0])
        M = torch.stack([B_t @ A_t for B_t, A_t in zip(B, A)])
        merged = fisher(M, F / F.mean().clamp_min(torch.finfo(F.dtype).tiny), a)
    else:
        g, x = found["outputs"].double(), found["inputs"].double()
        size = (g.mean(1) * x.mean(1)).mean().clamp_min(torch.finfo(g.dtype).tiny)
        merged = fisher_rank_one(B, A, (g / size).to(a.device), x.to(a.device), a, floor=1e-6)
    merged = merged.to(B[0])
    return merged.mT.contiguous() if w.transposed else merged


fisher_method = Method(
    name="fisher",
    title="Fisher merging",
    summary="mean of each entry, weighted by how much each adapter's loss on its texts depends on it",
    paper="Matena & Raffel, 2022",
    url="https://arxiv.org/abs/2111.09832",
    result=DENSE,
    merge=merge_fisher,
    guided=measure_fisher,
    passes=lambda p: Passes(
        "one pass over all texts, forwards and backwards", p.batch_tokens, True, statistics=gradients_of(p)
    ),
    needs_texts=True,
    parameters=FisherParameters,
    weight="share of a mean",
)
