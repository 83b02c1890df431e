"""A method: a name, its parameters, and one function from the adapters' factors to merged updates."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mergekit_tspa.adapters import Extraction
from mergekit_tspa.calibration.readings import Readings
from mergekit_tspa.errors import InputError, nearest
from mergekit_tspa.methods.inputs import PER_MODEL, Pair, Parameters, Planned, Progress, Survey, TensorInputs
from mergekit_tspa.methods.pico import at_mean_norm, pico
from mergekit_tspa.methods.report import Report, Truncation
from mergekit_tspa.methods.svc import svc
from mergekit_tspa.updates import Dense, LoraFactors, LowRank, Spanned


@dataclass(frozen=True)
class ResultRank:
    """How the rank of a merged update follows from the ranks of the adapters."""

    label: str  # as the method table shows it
    of: Callable[[Sequence[int], Parameters], int]  # from the adapters' ranks; the tensor's sides bound it
    dense: bool = False  # the update has no factors
    exact: bool = True  # otherwise it is an upper bound


def _asked_or_largest(ranks: Sequence[int], parameters: Parameters) -> int:
    """A method with this rank takes `rank` as the size of its subspaces; any of up to the summed ranks is
    possible.
    """
    return max(ranks) if parameters.rank is None else sum(ranks)


LARGEST_RANK = ResultRank("largest rank", lambda ranks, p: max(ranks))
SUM_OF_RANKS = ResultRank("sum of ranks", lambda ranks, p: sum(ranks))
RANK_PARAMETER = ResultRank("`rank`", _asked_or_largest)
DENSE = ResultRank("full (dense)", lambda ranks, p: sum(ranks), dense=True)


class Merged(NamedTuple):
    """Updates in the order of the inputs, and what the solvers report."""

    updates: Sequence[LowRank | Spanned | Dense]
    reports: Sequence[Report | Truncation]


class Passes(NamedTuple):
    """How a method reads texts, as far as it is known beforehand."""

    said: str
    tokens: int | None  # that are read at once, or None: those of all its texts
    gradients: bool = False
    texts: int | None = None  # of each adapter at once, or None: as many as there are
    held_out: bool = False  # some texts of each adapter are, which must have two
    # How many numbers stay in memory of one adapter and a tensor (d_out, d_in).
    statistics: Callable[[int, int], int] = lambda d_out, d_in: 0


MergeFunction: TypeAlias = Callable[[Sequence[TensorInputs], Sequence[Pair], Progress], Merged]


@dataclass(frozen=True)
class Method:
    """One row of the method table.

    `merge` takes all tensors of a chunk at once, so that a method may solve them in one batch, the attention
    pairs they belong to (for methods with `attention`), and a function to report progress to.
    """

    name: str
    title: str
    summary: str
    paper: str
    url: str
    result: ResultRank
    merge: MergeFunction
    parameters: type[Parameters] = Parameters
    weight: str = "linear"  # what an adapter's coefficient does, as the method table shows it
    split: str = "no"  # whether the result depends on how an adapter splits its update into `B` and `A`
    min_weight: float = float("-inf")  # smallest `weight` the method is defined for
    attention: bool = False  # looks at attention products, hence at the base's tensors
    solves: bool = False  # iterates, so that it is done, and can fail, before anything is written
    survey: Callable[[Callable[[], Iterable[TensorInputs]]], Survey] | None = None
    # Of a method that looks at texts: what they say of each tensor, which `merge` is given as the survey.
    guided: Callable[[Sequence[TensorInputs], Readings], Survey] | None = None
    passes: Callable[[Any], Passes] | None = None  # by the parameters
    needs_texts: bool = False  # and statistics that were made of them do not suffice
    record: Callable[[TensorInputs], dict[str, torch.Tensor]] | None = (
        None  # what is written beside the model
    )
    elects: bool = False  # lets the adapters vote on signs
    equal_ranks: bool = False  # of all adapters of a tensor
    check: Callable[[Sequence[Planned]], None] = lambda planned: None  # refuses what it cannot merge
    drops_zeros: bool = True  # an adapter whose update of a tensor is zero takes no part in that tensor

    @property
    def tensor_by_tensor(self) -> bool:
        """Whether it merges every tensor by itself, so that several can be merged at the same time."""
        return isinstance(self.merge, OneByOne) or self.guided is not None

    def carried(self, planned: Planned) -> int:
        """The rank that a tensor's merged update can have before `rank` cuts it."""
        smaller = min(planned.shape)
        return (
            smaller if self.result.dense else min(self.result.of(planned.ranks, planned.parameters), smaller)
        )

    def bind(self, values: Mapping[str, Any]) -> Parameters:
        """Validated parameters.

        Raises:
            InputError: an unknown name, or a value out of range.
        """
        unknown = set(values) - set(self.parameter_fields())
        if unknown:
            raise InputError(self.unknown_parameter(min(unknown)))
        try:
            bound = self.parameters(**values)
        except ValidationError as error:
            first = error.errors()[0]
            where = f"parameter {first['loc'][0]}: {first['input']!r}: " if first["loc"] else ""
            raise InputError(f"{self.name}: {where}{first['msg']}") from error
        for name, field in self.parameters.model_fields.items():
            given = values.get(field.alias or name)
            if isinstance(given, bool) and not isinstance(getattr(bound, name), bool):
                raise InputError(
                    f"{self.name}: parameter {field.alias or name}: {given}: true and yes are no numbers; "
                    "give a number"
                )
        return bound

    def extraction(self, values: Mapping[str, Any]) -> Extraction:
        """How full models become factors for this method.

        Raises:
            InputError: a value out of range, or ranks that are not known beforehand where they must be equal.
        """
        if self.equal_ranks and values.get("extract_energy"):
            raise InputError(
                f"extract_energy: {self.name} needs adapters of equal rank; give extract_rank instead"
            )
        return self.bind({name: values[name] for name in PER_MODEL if name in values}).extraction

    def parameter_fields(self) -> dict[str, FieldInfo]:
        """The parameters by their recipe names."""
        return {field.alias or name: field for name, field in self.parameters.model_fields.items()}

    def unknown_parameter(self, name: str) -> str:
        """That there is none of this name: what it may be a misspelling of, or whose parameter it is."""
        from mergekit_tspa.methods import METHODS  # which are made of this class

        known = ["weight", *self.parameter_fields()] + (["examples", "calibration"] if self.guided else [])
        every = {field: None for method in METHODS.values() for field in method.parameter_fields()}
        near = nearest(name, [*known, *every, "examples", "calibration"])
        if not near:
            hint = f"it has {', '.join(known)}"
        elif near[0] in (*known, "examples", "calibration"):  # which all methods take, and most ignore
            hint = f"did you mean {near[0]}?"
        else:
            owners = [method.name for method in METHODS.values() if near[0] in method.parameter_fields()]
            family = self.name.split("_")[0] + "_"
            kin = [owner for owner in owners if owner.startswith(family)] or owners
            hint = f"{near[0]} is a parameter of {', '.join(kin[:4])}{' and others' if len(kin) > 4 else ''}"
        return f"{self.name} has no parameter {name!r}; {hint}"


def prepared(w: TensorInputs) -> TensorInputs:
    """What comes before the method's own function."""
    return w._replace(factors=pico(w.factors)) if getattr(w.parameters, "pico", False) else w


@dataclass(frozen=True)
class OneByOne:
    """`Method.merge` of a closed formula that looks at one tensor at a time, with `OneByOneParameters` or
    without.
    """

    rule: Callable[[TensorInputs], LoraFactors | Spanned | Dense]

    def __call__(self, inputs: Sequence[TensorInputs], pairs: Sequence[Pair], progress: Progress) -> Merged:
        return Merged([self._merge(w) for w in inputs], [])

    def _merge(self, w: TensorInputs) -> LowRank | Spanned | Dense:
        p = w.parameters
        before, after = getattr(p, "pico", False), getattr(p, "svc", False)
        made = self.rule(prepared(w))
        if isinstance(made, Spanned) and not (before or after):
            return made.scaled(p.lambda_)
        made = made.low_rank() if isinstance(made, Spanned) else made
        update: LowRank | Dense = made if isinstance(made, Dense) else LowRank(*made)
        if before or after:
            weighted = [f.scaled(a) for f, a in zip(w.factors, w.weights)]
            update = at_mean_norm(update, weighted) if before else update
            update = svc(update, weighted) if after else update
        return update if p.lambda_ == 1 else update.scaled(p.lambda_)
