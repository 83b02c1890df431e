"""What a merge says of itself: what the solvers did, and what `rank` cut off."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mergekit_tspa.adapters import Adapter
from mergekit_tspa.alignment.stiefel import Solution


@dataclass(frozen=True, repr=False)
class Report:
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
        cls,
        stage: str,
        names: Sequence[str],
        adapters: Sequence[Sequence[Adapter]],
        solution: Solution,
        axis: int,
    ) -> "Report":
        """
        Args:
            axis: of the adapters in the solution's point
        """
        others = [i for i in range(1, solution.cosine.ndim) if i != axis]
        cosine = solution.cosine.mean(others) if others else solution.cosine
        return cls(
            stage,
            names=names,
            start=solution.start.cpu(),
            end=solution.end.cpu(),
            orthogonality=solution.orthogonality.max().item(),
            steps=int(solution.steps.max()),
            adapters=adapters,
            angles=[*cosine.clamp(-1, 1).acos().rad2deg().cpu()],
            scales=[*solution.log_s.exp().cpu()],
        )

    @classmethod
    def joined(cls, reports: Sequence["Report"]) -> "Report":
        """What was done to all batches of one stage."""
        return cls(
            reports[0].stage,
            names=[name for report in reports for name in report.names],
            start=torch.cat([report.start for report in reports]),
            end=torch.cat([report.end for report in reports]),
            orthogonality=max(report.orthogonality for report in reports),
            steps=max(report.steps for report in reports),
            adapters=[present for report in reports for present in report.adapters],
            angles=[angles for report in reports for angles in report.angles],
            scales=[scales for report in reports for scales in report.scales],
        )

    def __repr__(self) -> str:
        return f"<{self}>"  # not the thousands of values in the fields

    def __str__(self) -> str:
        return (
            f"{self.stage} of {len(self.names)}: objective {self.start.sum():.4g} -> {self.end.sum():.4g} "
            f"in {self.steps} steps, orthogonality {self.orthogonality:.0e}"
        )


@dataclass(frozen=True, repr=False)
class Truncation:
    """What `rank` left of each merged update: the share of `||dW||^2`."""

    kept: Mapping[str, float]
    stage: ClassVar[str] = "rank"

    @classmethod
    def joined(cls, reports: Sequence["Truncation"]) -> "Truncation":
        return cls({name: share for report in reports for name, share in report.kept.items()})

    def __repr__(self) -> str:
        return f"<{self}>"  # not the thousands of values in the fields

    def __str__(self) -> str:
        worst = min(self.kept, key=self.kept.__getitem__)
        mean = sum(self.kept.values()) / len(self.kept)
        return (
            f"`rank` keeps {mean:.1%} of the energy of {len(self.kept)} merged updates on average, "
            f"{self.kept[worst]:.1%} of {worst}"
        )


def summary(reports: Iterable[Report | Truncation]) -> list[Report | Truncation]:
    """One report per stage."""
    stages: dict[str, list[Any]] = {}
    for report in reports:
        stages.setdefault(report.stage, []).append(report)
    return [type(group[0]).joined(group) for group in stages.values()]
