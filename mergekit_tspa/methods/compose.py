"""Methods that are a rule in a space: `<space>_<rule>`.

A space writes the updates of a tensor as n matrices, in one part or in several; a rule merges the n
matrices of a part; the space joins the merged parts to an update.  Every rule in every space that takes it
is a row of the method table, and what a row does follows from the kind of its rule and the properties of
its space.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pydantic import Field, create_model
from torch import Tensor

from mergekit_tspa.adapters import Adapter
from mergekit_tspa.errors import InputError
from mergekit_tspa.linalg import product_svd
from mergekit_tspa.methods.emr_records import record
from mergekit_tspa.methods.inputs import Parameters, Planned, TensorInputs
from mergekit_tspa.methods.method import SUM_OF_RANKS, Method, OneByOne
from mergekit_tspa.methods.rules import RULES, Rule, Scoped
from mergekit_tspa.methods.spaces import FACTOR_SPACE, SPACES, UPDATE_SPACES, Space
from mergekit_tspa.methods.task_arithmetic import task_arithmetic
from mergekit_tspa.rules.rule_kinds import Entrywise, Linear, Spectral, Statistics
from mergekit_tspa.rules.stream import Products, Stream, merge_rows
from mergekit_tspa.spaces.coordinates import Part
from mergekit_tspa.spaces.cores import cores
from mergekit_tspa.spaces.factor import encode
from mergekit_tspa.updates import Dense, LoraFactors, Spanned


def merge_in_space(space: Space, rule: Rule, w: TensorInputs) -> LoraFactors | Spanned | Dense:
    """Encode, merge, join; in float64, entrywise rules in float32."""
    if isinstance(rule.kind, Linear):
        return _merge_linear(space, rule.kind, w)
    if isinstance(rule.kind, Spectral):
        return _merge_spectral(space, rule, rule.kind, w)
    return _merge_entrywise(space, rule, rule.kind, w)


def _merge_linear(space: Space, kind: Linear, w: TensorInputs) -> LoraFactors | Spanned | Dense:
    """In an isometric space the weighted sum of the updates; otherwise its projection."""
    try:
        coefficients = kind.coefficients(torch.tensor(w.weights, dtype=torch.float64)).tolist()
    except InputError as error:
        raise InputError(f"{w.name}: {error}") from error
    total = task_arithmetic(w.factors, coefficients)
    if space.isometric:
        return total
    coordinates = space.coordinates(w.factors, w.parameters)
    parts = coordinates.parts([total], [1.0])
    return _update(coordinates.joined([part.factors[0].dense() for part in parts]), like=total)


def _merge_spectral(
    space: Space, rule: Rule, kind: Spectral, w: TensorInputs
) -> LoraFactors | Spanned | Dense:
    """In coordinates as small as can be: the rule commutes with changes of orthonormal basis.

    The core stands in for a space that loses nothing.
    """
    isometric = space.isometric
    coordinates = cores(w.factors).basis() if isometric else space.coordinates(w.factors, w.parameters)
    merged = []
    for part in coordinates.parts(w.factors, w.weights):
        M = torch.stack([f.dense() for f in part.factors])
        room = min(w.factors[0].shape) if isometric else min(M.shape[1:])
        given = {"room": room, "triplets": product_svd(*encode(part.factors))}
        merged.append(kind.merge(M, M.new_tensor(part.weights), **given, **rule.own(w.parameters)))
    return _update(coordinates.joined(merged), like=w.factors[0])


def _merge_entrywise(
    space: Space, rule: Rule, kind: Entrywise, w: TensorInputs
) -> LoraFactors | Spanned | Dense:
    """By blocks of rows, so that no more than the result is ever held whole."""
    coordinates = space.coordinates(w.factors, w.parameters)
    merged = []
    for part in coordinates.parts(w.factors, w.weights):
        p, q = part.factors[0].shape
        part = _counted(space, part, w.factors)
        statistics = _statistics(kind.statistics, rule, w, part) if kind.statistics else None
        names = [adapter.name for adapter in w.adapters] if kind.random else []
        generators = [w.generator(w.parameters.seed, part.name, name) for name in names]
        own = rule.own(w.parameters)
        rows = merge_rows(kind, part.factors, part.weights, own, statistics, generators)
        merged.append(rows[:p, :q])
    return _update(coordinates.joined(merged), like=w.factors[0])


def _counted(space: Space, part: Part, factors: Sequence[LoraFactors]) -> Part:
    """The entries that a rule counts, in float32, zeros among them where the space has such.

    The published code of Core Space keeps `min(d, R)` directions of a side, `R = sum_t r_t`, also where the
    adapters share directions.  The coordinates along those that they do not have are zero.  Our basis leaves
    these directions out, so the zeros come back here, for the rules that take shares of all entries.
    """
    part = part._replace(factors=[f.to(torch.float32) for f in part.factors])
    if not space.counts_zeros:
        return part
    d_out, d_in = factors[0].shape
    total = sum(f.rank for f in factors)
    return part.padded(min(d_out, total), min(d_in, total))


def _statistics(wanted: Statistics, rule: Rule, w: TensorInputs, part: Part) -> Tensor:
    """Of this tensor, or those of the model that were taken before.  # (n, k)"""
    if w.survey:
        return torch.stack([w.survey[adapter] for adapter in w.adapters])
    products = Products(range(len(part.factors)), part.factors, part.weights)
    return wanted(Stream(lambda: [products]), **rule.own(w.parameters))


def _update(merged: LoraFactors | Spanned | Tensor, like: LoraFactors) -> LoraFactors | Spanned | Dense:
    if isinstance(merged, Tensor):
        return Dense(merged)
    if isinstance(merged, Spanned):
        return merged
    return LoraFactors(merged.B.to(like.B), merged.A.to(like.B))


def record_in_space(space: Space, rule: Rule, wanted: Statistics, w: TensorInputs) -> dict[str, Tensor]:
    """What is written of a tensor beside the model: masks and scales, and the bases they belong to."""
    coordinates = space.coordinates(w.factors, w.parameters)
    (part,) = coordinates.parts(w.factors, w.weights)
    scale = _statistics(wanted, rule, w, _counted(space, part, w.factors))[:, 0] * w.parameters.lambda_
    factors = [f.to(torch.float32) for f in part.factors]  # as the rule sees them
    kept = record(factors, scale.new_tensor(part.weights), scale)
    return kept | {name: side.float() for name, side in coordinates.sides().items()}


def survey_model(
    space: Space, rule: Rule, wanted: Statistics, inputs: Callable[[], Iterable[TensorInputs]]
) -> Mapping[Adapter, Tensor]:
    """The rule's statistics of every adapter over all tensors."""
    number: dict[Adapter, int] = {}
    first = next(iter(inputs()), None)
    if first is None:  # all updates are zero
        return {}

    def tensors() -> Iterator[Products]:
        for w in inputs():
            (part,) = space.coordinates(w.factors, w.parameters).parts(w.factors, w.weights)
            part = _counted(space, part, w.factors)
            numbers = [number.setdefault(a, len(number)) for a in w.adapters]
            yield Products(numbers, part.factors, part.weights)

    statistics = wanted(Stream(tensors), **rule.own(first.parameters))
    return {adapter: statistics[n] for adapter, n in number.items()}


def _method(space: Space, rule: Rule) -> Method:
    """The row of the method table."""
    kind = rule.kind if isinstance(rule.kind, Entrywise) else None
    recorded = kind.recorded if kind else None
    surveyed = (kind.statistics or recorded) if kind and space.scoped and rule.scoped else None
    return Method(
        name=f"{space.name}_{rule.name}",
        title=space.title.format(rule.title),
        summary=rule.summary + space.remark.format(rule.name),
        paper="; ".join(filter(None, (rule.paper, space.paper))),
        url=space.url or rule.url,
        result=SUM_OF_RANKS if space.isometric and kind is None else space.result,
        merge=OneByOne(lambda w: merge_in_space(space, rule, w)),
        survey=partial(survey_model, space, rule, surveyed) if surveyed else None,
        record=partial(record_in_space, space, rule, recorded) if recorded else None,
        parameters=_parameters(space, rule),
        weight=rule.weight,
        split=space.split if kind else "no",
        check=lambda plans: _check(space, rule, plans),
        elects=rule.elects,
        equal_ranks=space.equal_ranks,
    )


def _parameters(space: Space, rule: Rule) -> type[Parameters]:
    """Those of the space, of the rule, and of the statistics that can be taken over the model."""
    bases = [space.parameters, rule.parameters]
    bases += [Scoped] if space.scoped and rule.scoped else []
    own = tuple(base for base in bases if base is not Parameters)  # which is a base of them all
    fields = rule.parameters.model_fields
    other: dict[str, Any] = {
        name: (fields[name].annotation, Field(default, description=fields[name].description))
        for name, default in space.defaults.items()
        if name in fields
    }
    return create_model(f"{space.name}_{rule.name}", __base__=own or Parameters, **other)


def _check(space: Space, rule: Rule, plans: Sequence[Planned]) -> None:
    """Refuse what a recipe cannot ask for."""
    parameters = [plan.parameters for plan in plans]
    if rule.flat and any(p.svc for p in parameters):
        raise InputError(
            f"svc after {rule.name}: all singular values are equal, so there are no directions to calibrate"
        )
    if rule.recorded and not space.sized_by_rank and any(p.rank for p in parameters):
        fitting = " or ".join(f"{other.name}_{rule.name}" for other in SPACES if other.sized_by_rank)
        raise InputError(
            f"rank: a lower rank would no longer fit the masks of the tasks; use {fitting}, or leave it out"
        )


SPACE_RULE_METHODS = tuple(
    _method(space, rule)
    for spaces in (UPDATE_SPACES, (FACTOR_SPACE,))
    for rule in RULES
    for space in spaces
    if space.takes(rule)
)
