"""What a merge says of itself: what the solvers did, and what `rank` cut off."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from mergekit_tspa.adapters import Adapter
from mergekit_tspa.alignment.stiefel import Solution


class Report(NamedTuple):
    """What a solver did to a batch."""

    stage: str
    names: Sequence[str]  # of the problems
    start: torch.Tensor  # (problems,) objective before the first step
    end: torch.Tensor  # (problems,)
    orthogonality: float  # largest entry of |R^T R - I|
    steps: int
    adapters: Sequence[Sequence[Adapter]]  # of each problem
    angles: Sequence[torch.Tensor]  # (n,) of each: degrees, arccos of the mean cosine by which R_t turns
    scales: Sequence[torch.Tensor]  # (n,) of each: s_t

    @classmethod
    def of(
        cls, stage: str, names: Sequence[str], adapters: Sequence[Sequence[Adapter]], solution: Solution, axis: int
    ) -> "Report":
        """
        Args:
            axis: of the adapters in the solution's point
        """
        others = [i for i in range(1, solution.cosine.ndim) if i != axis]
        cosine = solution.cosine.mean(others) if others else solution.cosine
        return cls(
            stage,
            names,
            solution.start.cpu(),
            solution.end.cpu(),
            solution.orthogonality.max().item(),
            int(solution.steps.max()),
            adapters,
            [*cosine.clamp(-1, 1).acos().rad2deg().cpu()],
            [*solution.log_s.exp().cpu()],
        )

    @classmethod
    def joined(cls, reports: Sequence["Report"]) -> "Report":
        """What was done to all batches of one stage."""
        stage, names, start, end, orthogonality, steps, *of_each = zip(*reports)
        names, *of_each = ([*itertools.chain.from_iterable(lists)] for lists in (names, *of_each))
        return cls(stage[0], names, torch.cat(start), torch.cat(end), max(orthogonality), max(steps), *of_each)

    def __str__(self) -> str:
        return (
            f"{self.stage} of {len(self.names)}: objective {self.start.sum():.4g} -> {self.end.sum():.4g} "
            f"in {self.steps} steps, orthogonality {self.orthogonality:.0e}"
        )


class Truncation(NamedTuple):
    """What `rank` left of each merged update: the share of `||dW||^2`."""

    kept: Mapping[str, float]
    stage = "rank"

    @classmethod
    def joined(cls, reports: Sequence["Truncation"]) -> "Truncation":
        return cls(dict(item for report in reports for item in report.kept.items()))

    def __str__(self) -> str:
        worst = min(self.kept, key=self.kept.__getitem__)
        mean = sum(self.kept.values()) / len(self.kept)
        return (
            f"`rank` keeps {mean:.1%} of the energy of {len(self.kept)} merged updates on average, "
            f"{self.kept[worst]:.1%} of {worst}"
        )


def summary(reports: Iterable[Report | Truncation]) -> list[Report | Truncation]:
    """One report per stage."""
    stages: dict[str, list] = {}
    for report in reports:
        stages.setdefault(report.stage, []).append(report)
    return [type(group[0]).joined(group) for group in stages.values()]
