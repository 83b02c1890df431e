"""RegMean and RegMean++: answer each adapter's own inputs as that adapter does."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from mergekit_tspa.calibration.moments import DENSE_UP_TO, RANK, DenseInputs, InputStatistics, merge_in_order
from mergekit_tspa.calibration.readings import Readings
from mergekit_tspa.calibration.score import search_lambda
from mergekit_tspa.methods.inputs import Pair, Progress, Survey, TensorInputs
from mergekit_tspa.methods.method import RANK_PARAMETER, Merged, Method, Passes
from mergekit_tspa.methods.texts import (
    SEARCHED_TEXTS,
    TextParameters,
    as_survey,
    at_its_length,
    length_of,
    rank_of,
    statistics_of,
    take_solved,
    text_parameters,
)
from mergekit_tspa.rules.regmean import regmean, regmean_low_rank
from mergekit_tspa.threads import in_threads
from mergekit_tspa.updates import Dense, LoraFactors, LowRank, Spanned

LOG = logging.getLogger(__name__)

UNSOLVED = "\0"  # where the survey has what solving takes; no tensor has this name
BELOW = 1.25  # what the merged update of a layer is multiplied with before the layers above see its answers


class RegmeanParameters(TextParameters):
    ridge: float = Field(0.01, ge=0, description="of the inputs' mean square, added to their second moments")
    off_diagonal: float = Field(1.0, ge=0, le=1, description="factor of the moments beside the diagonal")


def regmean_tensor(
    factors: Sequence[LoraFactors],
    weights: Sequence[float],
    inputs: Sequence[InputStatistics],
    rank: int,
    ridge: float = 0.01,
    off_diagonal: float = 1.0,
    transposed: bool = False,
) -> LoraFactors:
    """The best update of that rank for inputs with these second moments, `rules/regmean.py`.

    Args:
        factors: of each adapter, in the orientation in which the base stores the tensor
        weights: `a_t`
        inputs: of each adapter
        rank: of the result
        ridge: as for `regmean`, and so is `off_diagonal`
        transposed: whether the base stores `(d_in, d_out)`
    """
    B, A = zip(*((f.A.mT, f.B.mT) if transposed else f for f in factors))
    like, a = B[0], torch.tensor(weights, dtype=torch.float64, device=B[0].device)
    if all(isinstance(one, DenseInputs) for one in inputs):
        Q, X = regmean(B, A, [one.dense().to(like) for one in inputs], a, rank, ridge, off_diagonal)
    else:
        U, values, rest = zip(*(tuple(part.to(like) for part in one.low_rank()[:3]) for one in inputs))
        Q, X = regmean_low_rank(B, A, U, values, rest, a, rank, ridge, off_diagonal)
    merged = LoraFactors(X.mT, Q.mT) if transposed else LoraFactors(Q, X)
    return merged.to(like.dtype)


def solve_regmean(inputs: Sequence[TensorInputs], readings: Readings) -> Mapping[str, LoraFactors]:
    """Every tensor by `regmean_tensor`, on the inputs that the single adapters have."""
    p = text_parameters(inputs)
    assert isinstance(p, RegmeanParameters)
    statistics = readings.statistics  # from the texts, before the threads of the model are shared out

    def solve(at: int) -> tuple[str, LoraFactors]:
        w = inputs[at]  # its factors are read now, and let go again
        return w.name, _solved(w, statistics_of(w, statistics), p)

    def done(count: int) -> None:
        readings.progress("merging", count / len(inputs), None)

    return dict(in_threads(solve, range(len(inputs)), done=done))


def _solved(w: TensorInputs, inputs: Sequence[InputStatistics], p: RegmeanParameters) -> LoraFactors:
    rank = rank_of(w, p)
    return regmean_tensor(w.factors, w.weights, inputs, rank, p.ridge, p.off_diagonal, w.transposed)


def moments_of(d_out: int, d_in: int) -> int:
    """How many numbers the statistics of one tensor and adapter are, unless another tensor shares them."""
    return d_in * (d_in if d_in <= DENSE_UP_TO else 2 * RANK)


@dataclass(frozen=True, eq=False)
class Unsolved:
    """What solving a tensor takes besides its factors, where all statistics lie in files."""

    statistics: Mapping[str, Mapping[str, InputStatistics]]  # by adapter and tensor of the base
    own_name: Callable[[str], str]  # of a tensor of the output in the base
    length: float  # lambda

    def solve(self, w: TensorInputs) -> LoraFactors:
        inputs = statistics_of(w._replace(name=self.own_name(w.name)), self.statistics)
        return _solved(w, inputs, w.parameters).scaled(self.length)


def study_regmean(inputs: Sequence[TensorInputs], readings: Readings) -> Survey:
    """The merged updates; or the statistics alone, where no search needs all updates and no texts fill the
    memory, so that a tensor is solved when it is its turn.
    """
    p = text_parameters(inputs)
    if all(source.examples is None for source in readings.sources.values()):
        length = length_of({}, p, readings)
        LOG.info("regmean: lambda %.3g", length)
        return {UNSOLVED: Unsolved(readings.statistics, readings.base.own_name, length)}
    return as_survey(at_its_length(solve_regmean(inputs, readings), p, readings, "regmean"))


def merge_regmean(inputs: Sequence[TensorInputs], pairs: Sequence[Pair], progress: Progress) -> Merged:
    """`Method.merge`: what is solved is taken, and what is not is solved now."""
    updates: list[LowRank | Spanned | Dense] = []
    for w in inputs:
        unsolved = (w.survey or {}).get(UNSOLVED)
        updates += [LowRank(*unsolved.solve(w))] if unsolved else take_solved([w], pairs, progress).updates
    return Merged(updates, [])


def merge_regmean_plus(
    inputs: Sequence[TensorInputs], readings: Readings
) -> Mapping[str, Mapping[str, Tensor]]:
    """RegMean whose inputs come from the layers that are merged below, in one pass.

    With `lambda: auto` layers are merged with a usual length first, which the layers above see, and then the
    texts find a factor on all of them.
    """
    p = text_parameters(inputs)
    assert isinstance(p, RegmeanParameters)
    by_name = {w.name: w for w in inputs}
    below = BELOW if isinstance(p.lambda_, str) else p.lambda_

    def solve(tensor: str, found: Mapping[str, InputStatistics]) -> LoraFactors:
        if tensor not in by_name:  # every adapter's update of it is zero, and so is the merged one
            return next(own[tensor] for own in readings.singles.factors.values() if tensor in own)
        w = by_name[tensor]
        return _solved(w, [found[adapter.name] for adapter in w.adapters], p).scaled(below)

    updates: Mapping[str, LoraFactors]
    updates = merge_in_order(readings.singles, readings.written, solve, progress=readings.progress)
    if isinstance(p.lambda_, str) and readings.has_given_texts:
        answers = readings.answers(SEARCHED_TEXTS)
        found = search_lambda(
            readings.singles,
            updates,
            answers,
            (0.85, 1.0, 1.15),
            readings.answer_tokens,
            progress=readings.progress,
        )
        updates = {tensor: update.scaled(found.lambda_) for tensor, update in updates.items()}
    return as_survey(updates)


regmean_method = Method(
    name="regmean",
    title="RegMean",
    summary="answers each adapter's own inputs as that adapter does, on a few of its texts",
    paper="Jin et al., 2023",
    url="https://arxiv.org/abs/2212.09849",
    result=RANK_PARAMETER,
    merge=merge_regmean,
    guided=study_regmean,
    passes=lambda p: Passes("one pass over all texts", p.batch_tokens, statistics=moments_of),
    parameters=RegmeanParameters,
    weight="share of a mean",
)
regmean_plus_method = Method(
    name="regmean_plus",
    title="RegMean++",
    summary="RegMean on the inputs that the layers merged below give, in one pass",
    paper="Nguyen et al., 2025",
    url="https://arxiv.org/abs/2508.03121",
    result=RANK_PARAMETER,
    merge=take_solved,
    guided=merge_regmean_plus,
    passes=lambda p: Passes("one pass over all texts, which are in memory together", None),
    needs_texts=True,
    parameters=RegmeanParameters,
    weight="share of a mean",
)
REGMEAN_METHODS = (regmean_method, regmean_plus_method)
