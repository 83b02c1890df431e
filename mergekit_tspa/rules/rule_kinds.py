"""Three kinds of rules.

A rule is one function `rule(M, weights, **own)` of n matrices `M (n, p, q)`, their weights `(n,)` and its
own parameters.  Its kind says what else it promises, by which its result can be had without n whole
matrices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mergekit_tspa.rules.update_statistics import Updates


class LinearRule(Protocol):
    def __call__(self, M: Tensor, weights: Tensor) -> Tensor: ...


class SpectralRule(Protocol):
    """`room`, a keyword, is how many directions the result may have; by default the smaller side of `M`.

    `triplets`, another, is the SVD of every `M_t`, where it is known.
    """

    def __call__(self, M: Tensor, weights: Tensor, *args: Any, **own: Any) -> Tensor: ...


class EntrywiseRule(Protocol):
    """`statistics (n, k)` and `uniform (n, p, q)` are keywords of the rules that have statistics or draw."""

    def __call__(self, M: Tensor, weights: Tensor, *args: Any, **own: Any) -> Tensor: ...


class Statistics(Protocol):
    """What a rule must know of each whole update.  # -> (n, k)"""

    def __call__(self, updates: Updates, *args: Any, **own: Any) -> Tensor: ...


@dataclass(frozen=True)
class Linear:
    """`merge(M, weights) = sum_t c_t M_t` with `c = coefficients(weights)`.

    So a sum of low-rank updates stays one, and is the same in every coordinate system that loses nothing.
    """

    merge: LinearRule
    coefficients: Callable[[Tensor], Tensor]  # (n,) -> (n,)


@dataclass(frozen=True)
class Spectral:
    """A rule on singular values and vectors, `merge(M, weights, room=.., **own)`.

    It commutes with changes of orthonormal basis, `merge(U^T M V) = U^T merge(M) V`, if
    `U U^T M V V^T = M`, so that it can be had in a small basis.  What such a basis does not show is `room`:
    how large the tensor itself is.
    """

    merge: SpectralRule


@dataclass(frozen=True)
class Entrywise:
    """A rule that looks at one row of all updates at a time, `merge(M, weights, **own)`.

    What it must know beyond the row are `statistics` of each update.  Given these as
    `merge(.., statistics=..)`, `M` may be any block of rows, and the result is that block of the merged
    matrix.  Given nothing, `merge` takes the statistics of `M` itself.
    """

    merge: EntrywiseRule
    statistics: Statistics | None = None
    recorded: Statistics | None = None  # are kept beside the result, which does not depend on them
    random: bool = False  # needs `merge(.., uniform=..)`, draws from [0, 1) in the shape of M
