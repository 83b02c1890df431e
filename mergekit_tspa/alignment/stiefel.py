"""Riemannian AMSGrad over batches of matrices with orthonormal rows, shared by every alignment stage.

A *point* is a tensor ``(problems, ..., k, d)``, ``k <= d``, whose matrices satisfy ``V V^T = I``: the
transpose of the Stiefel manifold St(d, k), the orthogonal group when ``k = d``, and an angle, as ``(cos,
sin)``, when ``k = 1`` and ``d = 2``. Rows rather than columns, because these are the factors' own layout.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

CHECK_EVERY = 20  # steps between looks at the losses; a look waits for the device
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # point, log_s -> loss, gradients
Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # both and their gradients -> both
Results = TypeVar("Results", bound=tuple[Any, ...])


class Solution(NamedTuple):
    """The best point looked at, per problem, and what is known about it. Every field has the problems in
    front.
    """

    point: Tensor  # (problems, ..., k, d)
    log_s: Tensor  # (problems, n)
    start: Tensor  # (problems,) the objective before the first step
    end: Tensor  # (problems,) the objective at `point`; never above `start`
    orthogonality: Tensor  # (problems,) largest entry of |V V^T - I|
    steps: Tensor  # (problems,) steps taken
    cosine: Tensor  # (problems, ...) mean cosine of the angles by which `point` is turned from the start


@torch.no_grad()
def minimise(
    objective: Objective,
    point: Tensor,
    log_s: Tensor,
    *,
    steps: int,
    lr: float,
    tolerance: float = 0.0,
    floor: Tensor | float = 0.0,
    solver: str = "amsgrad",
    on_progress: Callable[[float, float], None] | None = None,
    first: int = 0,
) -> Solution:
    """Minimise many independent objectives at once over orthonormal rows and log scales.

    ``objective(point, log_s)`` returns the loss of each problem ``(problems,)`` and the Euclidean gradients
    with respect to ``point`` and ``log_s``, which are overwritten. Each loss is divided by its start value,
    so that step sizes and epsilon mean the same everywhere; a problem that starts at or below ``floor``
    (rounding noise) stays there.

    ``tolerance`` stops early once the sum of the normalised losses fell by less than that fraction within
    ``CHECK_EVERY`` steps; 0 always takes all steps. ``solver`` is ``"amsgrad"`` or ``"geoopt"``, which take
    the same steps; the latter runs geoopt's own RiemannianAdam and serves as the reference. ``on_progress``
    hears the fraction done and the mean normalised loss; ``first`` is the number of the first problem, for
    the message of a FloatingPointError.
    """
    unturned, point = point, point.clone(memory_format=torch.contiguous_format)
    advance = {"amsgrad": _amsgrad, "geoopt": _geoopt}[solver](point, log_s, lr)
    for step in range(steps + 1):
        loss, d_point, d_log_s = objective(point, log_s)
        if step == 0:
            start, end = loss.clone(), loss.clone()
            best_point, best_log_s = point.clone(), log_s.clone()
            unit = torch.where(start > floor, 1 / start, 0)  # (problems,)
            checked = (end * unit).sum()
        if step % CHECK_EVERY == 0 or step == steps:
            if not (finite := torch.isfinite(loss)).all():
                culprit = first + int((~finite).nonzero()[0])
                raise FloatingPointError(f"the loss of alignment problem {culprit} is not finite", culprit)
            better = loss < end
            torch.where(better, loss, end, out=end)
            torch.where(_align(better, point), point, best_point, out=best_point)
            torch.where(better[:, None], log_s, best_log_s, out=best_log_s)
            previous, checked = checked, (end * unit).sum()
            if on_progress and steps:
                on_progress(step / steps, checked.item() / len(end))
            if not checked or (tolerance and step and previous - checked < tolerance * previous):
                break  # nothing left to do, or too little happens
        if step < steps:
            point, log_s = advance(point, log_s, d_point.mul_(_align(unit, point)), d_log_s * unit[:, None])
    error = (
        (best_point @ best_point.mT - torch.eye(point.shape[-2], dtype=point.dtype, device=point.device))
        .abs()
        .flatten(1)
        .amax(1)
    )
    if on_progress:
        on_progress(1.0, checked.item() / len(end))
    taken = torch.full_like(start, step, dtype=torch.long)
    cosine = (unturned * best_point).sum((-2, -1)) / point.shape[-2]
    return Solution(best_point, best_log_s, start.clamp(min=0), end.clamp(min=0), error, taken, cosine)


def retract(X: Tensor, out: Tensor | None = None) -> Tensor:
    """The orthonormal factor Q of ``X = L Q``, L lower triangular with positive diagonal (QR of ``X^T``).

    Through the Cholesky factor of ``X X^T``, which is accurate because X is always a short step from
    orthonormal.
    """
    if X.shape[-2] == 1:
        return torch.div(X, torch.linalg.vector_norm(X, dim=-1, keepdim=True), out=out)
    # No error check, which would wait for the device at every step; `minimise` looks for the NaN of failure.
    L = torch.linalg.cholesky_ex(X @ X.mT)[0]
    inverse = torch.linalg.solve_triangular(
        L, torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L), upper=False
    )
    return torch.matmul(inverse, X, out=out)


def leave_saddle(point: Tensor, similarity: Tensor, seed: int | None, size: float = 0.01) -> Tensor:
    """Rotate the start of each problem that has two coinciding adapters by a little, at random.

    Identical adapters have zero gradient at the identity although other rotations are better. ``similarity``
    ``(problems, factors, n, n)`` holds the adapters' inner products in each of their factors. All problems
    draw the same rotations, so a problem's result does not depend on its batch.  Without a seed nothing
    moves.
    """
    if seed is None:
        return point
    norm2 = similarity.diagonal(dim1=2, dim2=3)
    total = norm2[..., :, None] + norm2[..., None, :]
    close = (total - 2 * similarity).abs() <= 100 * torch.finfo(point.dtype).eps * total
    coincide = close.all(1).tril(-1).flatten(1).any(1)  # (problems,)
    if not coincide.any():
        return point
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(point.shape[1:], generator=generator, dtype=torch.float64, device="cpu")
    moved = retract(point + size / point.shape[-1] ** 0.5 * noise.to(point))
    return torch.where(_align(coincide, point), moved, point)


def in_parts(solve: Callable[[slice], Results], problems: int, size: int) -> Results:
    """Concatenate the results of ``solve`` on slices of at most ``size`` problems."""
    parts = [solve(slice(i, i + size)) for i in range(0, problems, size)]
    whole: Results = _concatenate(parts)
    return whole


def part_size(numbers: int, like: Tensor) -> int:
    """How many problems of this many numbers to solve at once: what a CPU's cache or a GPU's memory holds."""
    budget = 2**22 if like.device.type == "cpu" else 2**30  # bytes
    return max(1, budget // max(1, numbers * like.element_size()))


def _concatenate(parts: Any) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    fields = [_concatenate(field) for field in zip(*parts)]
    return type(parts[0])(*fields) if hasattr(parts[0], "_fields") else tuple(fields)


def _align(values: Tensor, like: Tensor) -> Tensor:
    """``(problems,)`` values shaped to broadcast against ``like``."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _transport(M: Tensor, V: Tensor) -> Tensor:
    """In place, the part of a direction that is tangent at V: ``M - sym(M V^T) V``."""
    A = torch.bmm(M, V.mT)
    return M.baddbmm_(A + A.mT, V, alpha=-0.5)


def _gradient(D: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """In place, the Riemannian gradient, and its squared length, both of the rotation that moves V.

    ``V = Q^T R`` moves by ``V W`` when R moves by ``R W``, ``W = skew(V^T D)``; hence ``(D - V D^T V) / 2``
    and ``||W||^2 = (||D||^2 - tr (D V^T)^2) / 2``.  So ``lr`` is the step length of R itself, for k < d as
    for k = d.
    """
    A = torch.bmm(D, V.mT)
    length = torch.linalg.vector_norm(D, dim=(1, 2), keepdim=True)
    square = (length.square_() - (A * A.mT).sum((1, 2), keepdim=True)) / 2
    return D.baddbmm_(A.mT, V, beta=0.5, alpha=-0.5), square.clamp_(min=0)


def _amsgrad(point: Tensor, log_s: Tensor, lr: float) -> Step:
    """A function that takes one step of Riemannian AMSGrad, as geoopt's RiemannianAdam(amsgrad=True) does.

    One second moment per matrix, QR retraction, momentum projected at the new point; for log s one per
    scalar.
    """
    # Large tensors are overwritten, never made anew: on a CPU, fresh memory costs more than the arithmetic.
    moment, spare = (
        torch.zeros_like(point).flatten(0, -3),
        torch.empty_like(point).flatten(0, -3),
    )  # (matrices, k, d)
    second, largest = moment.new_zeros(2, len(moment), 1, 1)
    moment_s, second_s, largest_s = (torch.zeros_like(log_s) for _ in range(3))
    count = 0

    def rate(second: Tensor, largest: Tensor, square: Tensor) -> Tensor:
        second.lerp_(square, 1 - BETA2)
        torch.maximum(largest, second, out=largest)
        divisor = (largest / (1 - BETA2**count)).sqrt_().add_(EPSILON)
        return divisor.mul_((BETA1**count - 1) / lr).reciprocal_()  # negative: downhill

    def advance(point: Tensor, log_s: Tensor, d_point: Tensor, d_log_s: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal count, spare
        count += 1
        V = point.flatten(0, -3)
        gradient, square = _gradient(d_point.flatten(0, -3), V)
        moment.lerp_(gradient, 1 - BETA1)
        V, spare = retract(V.addcmul_(moment, rate(second, largest, square)), out=spare), V
        _transport(moment, V)
        moment_s.lerp_(d_log_s, 1 - BETA1)
        log_s = torch.addcmul(log_s, moment_s, rate(second_s, largest_s, d_log_s.square()))
        return V.view(point.shape), log_s

    return advance


def _geoopt(point: Tensor, log_s: Tensor, lr: float) -> Step:
    """The same step by geoopt, whose Stiefel matrices have orthonormal columns."""
    import geoopt

    class Rotated(geoopt.EuclideanStiefel):  # type: ignore[misc]  # geoopt has no types
        """Columns ``P = R^T Q`` moved by a rotation, with the length of that rotation as metric."""

        def egrad2rgrad(self, P: Tensor, D: Tensor) -> Tensor:
            return (D - P @ D.mT @ P) / 2

        def inner(self, P: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
            v = u if v is None else v
            return (2 * u * v - (P @ (P.mT @ u)) * v).sum((-2, -1), keepdim=keepdim)

    P = geoopt.ManifoldParameter(point.mT.clone(), manifold=Rotated())
    scale = torch.nn.Parameter(log_s.clone())
    settings = dict(lr=lr, betas=(BETA1, BETA2), eps=EPSILON, amsgrad=True)
    optimiser = geoopt.optim.RiemannianAdam([P, scale], **settings)

    def advance(point: Tensor, log_s: Tensor, d_point: Tensor, d_log_s: Tensor) -> tuple[Tensor, Tensor]:
        P.grad, scale.grad = d_point.mT.contiguous(), d_log_s
        optimiser.step()
        return P.detach().mT.clone(memory_format=torch.contiguous_format), scale.detach().clone()

    return advance
