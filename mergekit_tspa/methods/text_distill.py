"""Distillation: train one adapter until it says what the single adapters say of their own texts.

Starts from another method's result at the rank of one adapter; no labels are used.  This is no published
method.
"""

from collections.abc import Mapping, Sequence

from pydantic import Field
from torch import Tensor

from mergekit_tspa.calibration.distill import check_texts, distill
from mergekit_tspa.calibration.readings import Readings
from mergekit_tspa.errors import InputError, nearest
from mergekit_tspa.methods.inputs import Planned, TensorInputs
from mergekit_tspa.methods.method import RANK_PARAMETER, Method, Passes
from mergekit_tspa.methods.text_regmean import moments_of
from mergekit_tspa.methods.texts import (
    LOG,
    TextParameters,
    as_survey,
    at_its_length,
    rank_of,
    take_solved,
    text_parameters,
)
from mergekit_tspa.updates import LoraFactors


class DistillParameters(TextParameters):
    start: str = Field("regmean", description="the method whose result the training starts from")
    steps: int = Field(96, ge=0, description="of the optimiser")
    texts_per_step: int = Field(2, ge=1, description="texts of each adapter in a step")
    rate: float = Field(1e-3, gt=0, allow_inf_nan=False, description="the largest learning rate")


def merge_distill(inputs: Sequence[TensorInputs], readings: Readings) -> Mapping[str, Mapping[str, Tensor]]:
    """
    Raises:
        InputError: a start of no method, or one that has no result at the rank of an adapter.
    """
    p = text_parameters(inputs)
    assert isinstance(p, DistillParameters)
    check_texts(readings.written)  # before the start, which takes its time
    if p.start == "regmean":
        readings.study()
    start = start_of(inputs, p, readings)
    found = distill(
        readings.singles,
        start,
        readings.answers(),
        steps=p.steps,
        texts_per_step=p.texts_per_step,
        rate=p.rate,
        seed=p.seed,
        progress=readings.progress,
    )
    LOG.info(
        "distill: the divergence from the single adapters fell from %.3g to %.3g of the base's in %d steps",
        found.start,
        found.end,
        found.steps,
    )
    return as_survey(found.updates)


def start_of(
    inputs: Sequence[TensorInputs], p: DistillParameters, readings: Readings
) -> Mapping[str, LoraFactors]:
    """What the training starts from: another method's result, cut to the rank of this one's.

    Raises:
        InputError: that method cannot merge these adapters.
    """
    from mergekit_tspa.methods import METHODS  # which distill is one of

    method = METHODS[p.start]
    shared = {name: getattr(p, name) for name in TextParameters.model_fields if method.guided}
    parameters = method.bind({}).model_copy(update=shared | {"lambda_": 1.0})
    assert readings.merged_by is not None
    ranks = {w.name: rank_of(w, p) for w in inputs}
    updates = {
        name: update.truncated(ranks[name])
        for name, update in readings.merged_by(method, parameters)
        if name in ranks
    }
    return at_its_length(updates, p, readings, "distill")


def passes_of(p: DistillParameters) -> Passes:
    """The start's own reading of texts takes less memory than the training."""
    steps = f"at most {p.steps} steps of training on {p.texts_per_step} texts of each adapter"
    said = f"{p.start} as a start; then {steps}"
    return Passes(said, None, True, p.texts_per_step, held_out=True, statistics=moments_of)


def check_start(planned: Sequence[Planned]) -> None:
    """
    Raises:
        InputError: there is no method of that name.
    """
    from mergekit_tspa.methods import METHODS

    for start in {one.parameters.start for one in planned}:
        if start not in METHODS or start == "distill":
            near = nearest(start, METHODS.keys() - {"distill"})
            hint = f"did you mean {near[0]}?" if near else "give the name of a method, such as regmean"
            raise InputError(f"start: {start}: {hint}")


distill_method = Method(
    name="distill",
    title="Distillation",
    summary="one adapter trained to say what each single adapter says of its own texts; no labels",
    paper="this project",
    url="",
    result=RANK_PARAMETER,
    merge=take_solved,
    guided=merge_distill,
    passes=passes_of,
    needs_texts=True,
    parameters=DistillParameters,
    weight="of the start",
    check=check_start,
)
