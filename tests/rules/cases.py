"""Published outputs of the regression family, and small random adapters."""

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import FIXTURES

LAYERS = ("l0", "l1")
CASES = ("hom8", "het")
ELEMENTWISE, WITH_SVD = 1e-5, 1e-4
IN_FLOAT64 = 1e-9  # where the published code ran in float64
ROUNDING = 1e-10  # of two ways to compute the same in float64


def published(name: str) -> dict[str, Tensor]:
    """The tensors of a file, inputs and outputs."""
    return load_file(FIXTURES / f"{name}.safetensors")


def factors(case: str, layer: str) -> tuple[list[Tensor], list[Tensor]]:
    """`B_t` and `A_t` of the four adapters of a case, in float64."""
    tensors = published(f"inputs.{case}")
    B = [tensors[f"in.{layer}.{t}.B"].double() for t in range(4)]
    A = [tensors[f"in.{layer}.{t}.A"].double() for t in range(4)]
    return B, A


def updates(case: str, layer: str) -> Tensor:
    """`D_t` of the same  # (4, d_out, d_in)"""
    return dense(*factors(case, layer))


def of_tasks(tensors: dict[str, Tensor], layer: str, name: str) -> list[Tensor]:
    return [tensors[f"in.{layer}.{t}.{name}"] for t in range(4)]


def dense(B: list[Tensor], A: list[Tensor]) -> Tensor:
    return torch.stack([B_t @ A_t for B_t, A_t in zip(B, A)])


def draw(ranks=(3, 5, 2), d_out=20, d_in=14, seed=0) -> tuple[list[Tensor], list[Tensor]]:
    """Random factors of the given ranks, in float64."""
    normal = drawer(seed)
    return [normal(d_out, r) for r in ranks], [normal(r, d_in) for r in ranks]


def drawer(seed: int):
    """A function from a shape to normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def regauged(B: list[Tensor], A: list[Tensor], seed: int = 7) -> tuple[list[Tensor], list[Tensor]]:
    """`B_t G_t` and `G_t^-1 A_t`, the same updates in other factors."""
    normal = drawer(seed)
    G = [normal(len(A_t), len(A_t)) + 4 * torch.eye(len(A_t)) for A_t in A]
    return [B_t @ G_t for B_t, G_t in zip(B, G)], [torch.linalg.solve(G_t, A_t) for A_t, G_t in zip(A, G)]


def weigh(*values: float) -> Tensor:
    """Weights in float64, in which most numbers are other than in float32."""
    return torch.tensor(values, dtype=torch.float64)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(drawer(seed)(rows, columns)).Q
