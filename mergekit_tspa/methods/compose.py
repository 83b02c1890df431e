"""Methods that are a rule in a space: `<space>_<rule>`.

A space gives a basis for each side of a weight, a rule merges n matrices of one shape.  Every combination is a row of
the method table; no code belongs to a combination.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, create_model
from torch import Tensor

from mergekit_tspa.adapters import Adapter
from mergekit_tspa.errors import InputError
from mergekit_tspa.methods.emr_records import record
from mergekit_tspa.methods.inputs import OneByOneParameters, Parameters, Planned, TensorInputs
from mergekit_tspa.methods.method import (
    DENSE,
    LARGEST_RANK,
    RANK_PARAMETER,
    SUM_OF_RANKS,
    Method,
    ResultRank,
    one_by_one,
)
from mergekit_tspa.methods.rules import RULES, Rule, Scoped, row_blocks
from mergekit_tspa.methods.task_arithmetic import task_arithmetic
from mergekit_tspa.spaces.basis import FULL, Basis
from mergekit_tspa.spaces.core import core
from mergekit_tspa.spaces.ctm import ctm
from mergekit_tspa.spaces.factor import encode
from mergekit_tspa.spaces.knots import knots
from mergekit_tspa.updates import Dense, LoraFactors


class CoreParameters(Parameters):
    balance: bool = Field(False, description="write every adapter with the singular factors of its update first")


class CtmParameters(Parameters):
    rank: int | None = Field(
        None, ge=1, description="rank of the shared subspaces and of the result; by default the largest of an adapter"
    )
    beta: float = Field(0.0, ge=0, le=1, description="0: all adapters count alike in the subspaces; 1: by their norm")


@dataclass(frozen=True)
class Space:
    """Coordinates to compare updates in: `basis(factors, parameters)`."""

    name: str
    title: str
    summary: str
    paper: str
    url: str
    basis: Callable[[Sequence[LoraFactors], Any], Basis]
    result: ResultRank
    parameters: type[Parameters] = Parameters
    lossless: bool = True


def full(factors: Sequence[LoraFactors], parameters: Parameters) -> Basis:
    return FULL


SPACES = (
    Space(
        name="lora",
        title="full space",
        summary="the updates `B A` themselves",
        paper="",
        url="",
        basis=full,
        result=DENSE,
    ),
    Space(
        name="knots",
        title="KnOTS",
        summary="left singular basis of all updates side by side",
        paper="Stoica et al., 2024",
        url="https://arxiv.org/abs/2410.19735",
        basis=lambda factors, p: knots(factors),
        result=SUM_OF_RANKS,
    ),
    Space(
        name="core",
        title="Core Space",
        summary="singular bases of the stacked factors",
        paper="Panariello et al., 2025",
        url="https://arxiv.org/abs/2509.17786",
        basis=lambda factors, p: core(factors, p.balance),
        result=SUM_OF_RANKS,
        parameters=CoreParameters,
    ),
    Space(
        name="ctm",
        title="Compress-then-Merge",
        summary="one pair of rank-`rank` subspaces for all updates, by HOOI",
        paper="He et al., ICML 2026",
        url="https://arxiv.org/abs/2606.03723",
        basis=lambda factors, p: ctm(factors, p.rank or max(f.rank for f in factors), p.beta),
        result=RANK_PARAMETER,
        parameters=CtmParameters,
        lossless=False,
    ),
)
FACTOR_RULES = ("ties", "magnitude_prune", "dare_linear", "dare_ties")


def merge_in_space(space: Space, rule: Rule, w: TensorInputs) -> LoraFactors | Dense:
    """Encode, merge, decode; in float64, elementwise rules in float32."""
    if rule.linear:
        return _merge_linear(space, rule, w)
    # Spectral rules give the same result in every lossless basis, and do it far cheaper in a small one.
    basis = core(w.factors) if space.basis is full and not rule.elementwise else space.basis(w.factors, w.parameters)
    coordinates = basis.encode(w.factors)
    if rule.elementwise:
        M = merge_elementwise(rule, w, coordinates, w.weights)
    else:
        M = torch.stack([f.dense() for f in coordinates])
        room = min(w.factors[0].shape) if space.lossless else min(M.shape[1:])
        M = rule.merge(M, M.new_tensor(w.weights), w.parameters, room)
    merged = basis.decode(M)
    return Dense(merged) if isinstance(merged, Tensor) else LoraFactors(*(t.to(w.factors[0].B) for t in merged))


def _merge_linear(space: Space, rule: Rule, w: TensorInputs) -> LoraFactors:
    """In a lossless space the weighted sum of the updates, whatever the basis; otherwise its projection."""
    if rule.name == "mean" and abs(sum(w.weights)) <= 1e-6 * sum(map(abs, w.weights)):
        raise InputError(f"{w.name}: the weights {list(w.weights)} add up to 0, so there is no mean of its adapters")
    weights = rule.linear(torch.tensor(w.weights, dtype=torch.float64)).tolist()
    total = task_arithmetic(w.factors, weights)
    if space.lossless:
        return total
    basis = space.basis(w.factors, w.parameters)
    projected = basis.decode(basis.encode([total])[0].dense())
    return LoraFactors(*(t.to(total.B) for t in projected))


def merge_elementwise(
    rule: Rule, w: TensorInputs, coordinates: Sequence[LoraFactors], weights: Sequence[float], side: str = ""
) -> Tensor:
    """A rule applied block of rows by block of rows, so that no more than the result is ever held whole."""
    p = w.parameters
    needed = rule.survey and not rule.records
    statistics = _statistics(rule, w, coordinates) if needed else None
    a = coordinates[0].B.new_tensor(weights).float()
    generators = [w.generator(p.seed, side, adapter.name) for adapter in w.adapters] if rule.random else []
    M = a.new_empty(coordinates[0].shape)
    for rows, block in row_blocks(coordinates):
        draw = lambda: torch.stack([torch.rand(block.shape[1:], generator=g, device=a.device) for g in generators])  # noqa: B023, E731
        M[rows] = rule.merge(block, a, p, statistics, draw)
    return M


def _statistics(rule: Rule, w: TensorInputs, coordinates: Sequence[LoraFactors]) -> Tensor:
    """Of this weight, or those of the model that were taken before.  # (n, ...)"""
    if w.survey:
        return torch.stack([w.survey[adapter] for adapter in w.adapters])
    return rule.survey(lambda: [(range(len(coordinates)), coordinates, w.weights)], w.parameters)


def record_in_space(space: Space, rule: Rule, w: TensorInputs) -> dict[str, Tensor]:
    """What EMR writes of a weight beside the unified model."""
    basis = space.basis(w.factors, w.parameters)
    coordinates = basis.encode(w.factors)
    scale = _statistics(rule, w, coordinates)[:, 0] * w.parameters.lambda_
    return record(coordinates, scale.new_tensor(w.weights), scale, basis)


def merge_factors(rule: Rule, w: TensorInputs) -> LoraFactors:
    """The rule on all `B` and on all `A` apart, with weights `sqrt|a_t|` and `sgn(a_t) sqrt|a_t|`, as PEFT does."""
    B, A = encode(w.factors)
    one = torch.eye(B.shape[2]).to(B)
    roots = [abs(a) ** 0.5 for a in w.weights]
    signed = [root if a > 0 else -root for root, a in zip(roots, w.weights)]
    return LoraFactors(
        merge_elementwise(rule, w, [LoraFactors(b, one) for b in B], roots, "B"),
        merge_elementwise(rule, w, [LoraFactors(one, a) for a in A], signed, "A"),
    )


def survey_model(space: Space, rule: Rule, inputs: Callable[[], Iterable[TensorInputs]]) -> Mapping[Adapter, Tensor]:
    """The rule's statistics of every adapter over all weights."""
    number: dict[Adapter, int] = {}
    first = next(iter(inputs()), None)
    if first is None:  # all updates are zero
        return {}

    def streams() -> Iterator:
        for w in inputs():
            basis = space.basis(w.factors, w.parameters)
            yield [number.setdefault(a, len(number)) for a in w.adapters], basis.encode(w.factors), w.weights

    statistics = rule.survey(streams, first.parameters)
    return {adapter: statistics[n] for adapter, n in number.items()}


def _combination(space: Space, rule: Rule) -> Method:
    scoped = issubclass(rule.parameters, Scoped)
    return Method(
        name=f"{space.name}_{rule.name}",
        title=rule.title if space.basis is full else f"{rule.title} in {space.title}",
        summary=rule.summary,
        paper="; ".join(filter(None, (rule.paper, space.paper))),
        url=space.url or rule.url,
        result=SUM_OF_RANKS if space.lossless and not rule.elementwise else space.result,
        merge=one_by_one(lambda w: merge_in_space(space, rule, w)),
        survey=(lambda inputs: survey_model(space, rule, inputs)) if scoped else None,
        record=(lambda w: record_in_space(space, rule, w)) if rule.records else None,
        parameters=_parameters(f"{space.name}_{rule.name}", space.parameters, rule.parameters),
        check=lambda plans: None if space.parameters is CtmParameters and rule.records else _check(rule, plans),
        elects=rule.elects,
    )


def _check(rule: Rule, plans: Sequence[Planned]) -> None:
    rule.check([plan.parameters for plan in plans])


def _factor_combination(rule: Rule) -> Method:
    # `scope` has no meaning for factors; what the trim keeps is PEFT's.
    fields = {name: (f.annotation, f) for name, f in rule.parameters.model_fields.items() if name != "scope"}
    if "convention" in fields:
        fields["convention"] = (fields["convention"][0], Field("peft", description=fields["convention"][1].description))
    return Method(
        name=f"factor_{rule.name}",
        title=f"{rule.title} on factors",
        summary=f"{rule.summary}; `B` and `A` apart, as PEFT's `{rule.name}`; contains cross terms",
        paper=f"{rule.paper}; PEFT",
        url="https://huggingface.co/docs/peft/developer_guides/model_merging",
        result=LARGEST_RANK,
        merge=one_by_one(lambda w: merge_factors(rule, w)),
        parameters=create_model(f"factor_{rule.name}", __base__=OneByOneParameters, **fields),
        elects=rule.elects,
        equal_ranks=True,
    )


def _parameters(name: str, *bases: type[Parameters]) -> type[Parameters]:
    return create_model(name, __base__=tuple(base for base in bases if base is not Parameters))


SPACE_RULE_METHODS = (
    *(_combination(space, rule) for rule in RULES for space in SPACES),
    *(_factor_combination(rule) for rule in RULES if rule.name in FACTOR_RULES),
)
