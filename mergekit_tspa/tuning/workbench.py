"""Where trials are run: a base in memory, the adapters, and texts to judge by; the same on every worker."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from mergekit_tspa.calibration.examples import Example
from mergekit_tspa.calibration.readings import Readings
from mergekit_tspa.errors import InputError
from mergekit_tspa.merging.plan import MergePlan, Variation
from mergekit_tspa.methods import METHODS
from mergekit_tspa.methods.inputs import Progress
from mergekit_tspa.methods.method import Method
from mergekit_tspa.methods.texts import TextParameters
from mergekit_tspa.scoring.candidates import check_unmoved, merged_parts, rank_of
from mergekit_tspa.scoring.judge import GENERAL, Judge
from mergekit_tspa.scoring.losses import Losses
from mergekit_tspa.scoring.placement import Placement, place


class Spec(NamedTuple):
    """A merge to try."""

    method: str
    parameters: Mapping[str, Any] = {}  # as in a recipe
    weights: Mapping[str, float] = {}  # by adapter; those that are not named have weight 1

    def described(self) -> str:
        """
        >>> Spec("core_tsv", {"lambda": 0.8}, {"a/math": 0.5}).described()
        'core_tsv, lambda 0.8, weights math 0.5'
        """
        parts = [self.method, *(f"{name} {_short(value)}" for name, value in self.parameters.items())]
        weights = {name: weight for name, weight in self.weights.items() if weight != 1}
        if weights:
            own = " ".join(f"{name.rstrip('/').split('/')[-1]} {_short(w)}" for name, w in weights.items())
            parts.append(f"weights {own}")
        return ", ".join(parts)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class Job(NamedTuple):
    """A merge, and the texts that judge it."""

    spec: Spec
    texts: Mapping[str, Sequence[int]]  # by task, numbers of texts
    seconds: float | None = None  # that the merge may take, so that a slow method does not eat the search


class Seen(NamedTuple):
    """What a job found."""

    losses: Losses  # in the order of the numbers
    rank: int | None  # if it is one adapter


def _hurry(seconds: float | None) -> Progress:
    """A progress that ends what takes longer; methods report theirs every second or so."""
    end = math.inf if seconds is None else time.monotonic() + seconds

    def progress(stage: str, done: float, left: float | None = None) -> None:
        if time.monotonic() > end:
            raise InputError(f"it takes longer than {seconds:.0f} s, which is too long for this search")

    return progress


@dataclass
class Workbench:
    """
    Args:
        merge: any merge of the adapters, of which all others are variations
        judge: with all texts, those of the search and those it never sees
        readings: texts that methods may look at, if there are any; they keep what was computed of them
        rank: of the result, which is to be one adapter; None: any
        device: where methods compute
    """

    merge: MergePlan
    judge: Judge
    readings: Readings | None = None
    rank: int | None = None
    device: torch.device | str = "cpu"
    _last: tuple[Spec, Placement] | None = field(default=None, repr=False)

    @torch.no_grad()
    def run(self, job: Job) -> Seen:
        """
        Raises:
            InputError: the method refuses the adapters, or has no result at the rank that is asked for.
        """
        if self._last is None or self._last[0] != job.spec:
            self._last = None  # which may be large
            self._last = job.spec, self.placement(job.spec, job.seconds)
        placement = self._last[1]
        every = self.judge.every
        texts: dict[str, list[Example]] = {
            task: [every[task][i] for i in numbers] for task, numbers in job.texts.items() if numbers
        }
        judged = self.judge.merged(job.spec.method, placement, texts)
        return Seen(judged.losses, rank_of(placement))

    def placement(self, spec: Spec, seconds: float | None = None) -> Placement:
        """A merge, ready to be put into the model.

        Args:
            seconds: that it may take

        Raises:
            InputError: it takes longer, or the method refuses the adapters.
        """
        plan = self.planned(spec)
        # Reading texts is not hurried: what was read serves all later trials.
        hurry = _hurry(None if plan.method.guided else seconds)
        readings = self.readings if plan.method.guided else None
        placement = place(self.judge.singles, merged_parts(plan, self.device, hurry, readings))
        rank = rank_of(placement)
        if self.rank is not None and (rank is None or rank > self.rank):
            raise InputError(f"{spec.method}: what it merges to is no adapter of rank {self.rank}")
        return placement

    def planned(self, spec: Spec) -> MergePlan:
        """The merge as a plan."""
        method, again = METHODS[spec.method], self.merge.again
        assert again is not None
        parameters = method.bind(with_rank(self.merge, method, spec.parameters, self.rank))
        weights = {adapter: spec.weights.get(adapter.name, 1.0) for adapter in self.merge.adapters}
        guide = self.merge.guide
        if method.guided:
            if self.readings is None or guide is None:
                raise InputError(f"{method.name}: it looks at texts, and there are no examples")
            assert isinstance(parameters, TextParameters)
        plan = again(Variation(method, parameters, weights, guide))
        check_unmoved(plan)
        return plan

    @property
    def tasks(self) -> list[str]:
        """Names of the adapters, and of the texts that belong to none."""
        return [*self.judge.texts, *([GENERAL] if self.judge.general else [])]


def with_rank(
    merge: MergePlan, method: Method, parameters: Mapping[str, Any], rank: int | None
) -> Mapping[str, Any]:
    """The parameters of a merge whose result has at most this rank.

    A merge whose updates carry less anyway gets no `rank`, which would be refused.
    """
    if rank is None:
        return parameters
    cut = {**parameters, "rank": rank}
    bound = method.bind(cut)
    carried = [method.carried(tensor.planned._replace(parameters=bound)) for tensor in merge.tensors]
    return cut if max(carried, default=0) >= rank else parameters
