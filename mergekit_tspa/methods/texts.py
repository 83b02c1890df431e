"""What methods that look at texts have in common: their parameters, and the length of the merged update."""

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from mergekit_tspa.calibration.moments import InputStatistics, SketchedInputs
from mergekit_tspa.calibration.readings import Reading, Readings
from mergekit_tspa.calibration.score import search_lambda
from mergekit_tspa.errors import InputError
from mergekit_tspa.methods.inputs import Pair, Parameters, Progress, TensorInputs
from mergekit_tspa.methods.method import Merged
from mergekit_tspa.updates import LoraFactors, LowRank

LOG = logging.getLogger(__name__)

# Layer by layer the answer is too short.  These are what the search finds on the sets of adapters that were
# measured, `benchmarks/examples.py`; they serve where there are no texts to search with.
USUAL_LAMBDA = 1.3
SELF_LAMBDA = 1.5  # of texts that adapters write with no prompt, which a search takes for too good
SEARCHED_TEXTS = 4  # of each adapter, for the search


Length = Annotated[float, Field(allow_inf_nan=False)] | Literal["auto"]


class TextParameters(Parameters):
    """Parameters of methods that look at texts."""

    lambda_: Length = Field(  # type: ignore[assignment]  # wider than in other methods
        "auto", alias="lambda", description="factor on the merged update; `auto`: found by the texts"
    )
    rank: int | None = Field(
        None, ge=1, description="rank of the merged update; by default the largest of an adapter"
    )
    seed: int = Field(42, ge=0, lt=2**63, description="seed of the answers that adapters write themselves")
    self_texts: int = Field(32, ge=2, description="texts that an adapter writes where `examples: self`")
    new_tokens: int = Field(110, ge=1, description="tokens of an answer that an adapter writes, at most")
    temperature: float = Field(0.7, ge=0, le=2, description="of what adapters write; 0: the likeliest token")
    batch_tokens: int = Field(4096, ge=16, description="tokens that are read at once; fewer need less memory")
    memory: float | None = Field(
        None, gt=0, description="GiB for the base, which is streamed if it is larger; by default what is free"
    )

    @property
    def reading(self) -> Reading:
        fields = {name: getattr(self, name) for name in Reading._fields}
        return Reading(**fields)


def text_parameters(inputs: Sequence[TensorInputs]) -> TextParameters:
    """The one set of parameters of a merge that looks at texts."""
    parameters = inputs[0].parameters
    assert isinstance(parameters, TextParameters)
    return parameters


def statistics_of(
    w: TensorInputs, statistics: Mapping[str, Mapping[str, InputStatistics]]
) -> list[InputStatistics]:
    """The statistics of one tensor's inputs, by adapter.

    Where no token of an adapter's texts reaches a tensor, an expert for instance, its inputs count as having
    no preferred direction, and as much as those of the others.
    """
    found = [statistics[adapter.name].get(w.name) for adapter in w.adapters]
    known = [one for one in found if one is not None and one.tokens]
    d = w.factors[0].shape[0 if w.transposed else 1]
    size = sum(float(one.trace()) for one in known) / len(known) / d if known else 1.0
    even = SketchedInputs(torch.zeros(d, 0), torch.zeros(0), torch.full((d,), size or 1.0), 1)
    return [one if one is not None and one.tokens else even for one in found]


def rank_of(w: TensorInputs, parameters: TextParameters) -> int:
    """The rank that is asked for, or the largest of the adapters."""
    return parameters.rank or max(f.rank for f in w.factors)


def at_its_length(
    updates: Mapping[str, LoraFactors], parameters: TextParameters, readings: Readings, name: str
) -> Mapping[str, LoraFactors]:
    """The updates times `lambda`."""
    length = length_of(updates, parameters, readings)
    LOG.info("%s: lambda %.3g", name, length)
    return {tensor: update.scaled(length) for tensor, update in updates.items()}


def length_of(updates: Mapping[str, LoraFactors], parameters: TextParameters, readings: Readings) -> float:
    """`lambda`, which texts that were given find by a search where it is `auto`."""
    if not isinstance(parameters.lambda_, str):
        return parameters.lambda_
    if not readings.has_given_texts:
        return SELF_LAMBDA if readings.has_texts else USUAL_LAMBDA
    answers = readings.answers(SEARCHED_TEXTS)
    found = search_lambda(
        readings.singles,
        updates,
        answers,
        batch_tokens=readings.answer_tokens,
        progress=readings.progress,
    )
    return found.lambda_


def as_survey(updates: Mapping[str, LoraFactors]) -> dict[str, dict[str, torch.Tensor]]:
    """Merged updates in the form in which they travel to `take_solved`."""
    return {tensor: {"B": update.B, "A": update.A} for tensor, update in updates.items()}


def take_solved(inputs: Sequence[TensorInputs], pairs: Sequence[Pair], progress: Progress) -> Merged:
    """`Method.merge` of a method that merges the whole model beforehand: its updates are there already."""
    updates: list[LowRank] = []
    for w in inputs:
        if w.survey is None:
            raise InputError(f"{w.name}: nothing was read of it")
        like, solved = w.factors[0].B, w.survey[w.name]
        updates.append(LowRank(solved["B"].to(like), solved["A"].to(like)))
    return Merged([*updates], [])
