"""The peers of TSPA: time against the same method on dense updates, memory, and whole sets of adapters.

    python benchmarks/peers.py [dense] [memory] [sets]

`dense`: one 4096 x 4096 weight, eight adapters of rank 16, against the same method on dense updates.
`memory`: peak memory of one such weight above what holds the adapters, in dense matrices.
`sets`: q, k, v and o of all 32 layers with the shapes of Llama-3-8B, six adapters of rank 16.
"""

import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date

import torch

from mergekit_tspa import METHODS, LoraFactors, merge_adapters
from mergekit_tspa.rules.spectral import tsv
from mergekit_tspa.rules.ties import elect_and_merge

WIDTH, ADAPTERS, RANK = 4096, 8, 16
IN_SMALL = ["knots_ties", "knots_pcb", "core_ties", "core_tsv", "core_emr", "ctm_ties", "ctm_tsv"]
IN_SMALL += ["svd_cur", "robustmerge", "lora_lego", "rotation"]
IN_FACTORS = ("knots_ties", "core_ties", "core_tsv", "ctm_ties", "ctm_tsv")


def adapters(n: int, rank: int, shapes: dict[str, tuple[int, int]]) -> list[dict[str, LoraFactors]]:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g) / shape[-1] ** 0.5  # noqa: E731
    return [{m: LoraFactors(draw(o, rank), draw(rank, i)) for m, (o, i) in shapes.items()} for _ in range(n)]


def timed(work) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def trimmed(M: torch.Tensor, density: float = 0.2) -> torch.Tensor:
    thresholds = [m.abs().flatten().kthvalue(m.numel() - int(density * m.numel())).values for m in M]
    return torch.stack([m * (m.abs() >= t) for m, t in zip(M, thresholds)])


def leading(D: torch.Tensor, rank: int) -> torch.Tensor:
    """Left singular vectors of all updates side by side, from the Gram matrix: kinder than the published SVD."""
    return torch.linalg.eigh((D @ D.mT).sum(0)).eigenvectors[:, -rank:]


def dense_knots_ties(D: torch.Tensor) -> torch.Tensor:
    U = leading(D, ADAPTERS * RANK)
    return U @ elect_and_merge(trimmed(U.mT @ D), torch.ones(len(D)))


def dense_basis(D: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return leading(D, rank), leading(D.mT, rank)


def dense_hooi(D: torch.Tensor, rank: int, steps: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    P, Q = dense_basis(D, rank)
    for _ in range(steps):
        P = torch.linalg.svd(torch.cat(list(D @ Q), dim=1), full_matrices=False).U[:, :rank]
        Q = torch.linalg.svd(torch.cat(list(D.mT @ P), dim=1), full_matrices=False).U[:, :rank]
    return P, Q


def in_basis(D: torch.Tensor, P: torch.Tensor, Q: torch.Tensor, rule) -> torch.Tensor:
    return P @ rule(P.mT @ D @ Q, torch.ones(len(D))) @ Q.mT


def dense_peers(D: torch.Tensor) -> dict:
    """The same methods written for dense updates."""
    R = ADAPTERS * RANK
    ties = lambda M, a: elect_and_merge(trimmed(M), a)  # noqa: E731
    return {
        "knots_ties": lambda: dense_knots_ties(D),
        "core_ties": lambda: in_basis(D, *dense_basis(D, R), ties),
        "core_tsv": lambda: in_basis(D, *dense_basis(D, R), tsv),
        "ctm_ties": lambda: in_basis(D, *dense_hooi(D, RANK), ties),
        "ctm_tsv": lambda: in_basis(D, *dense_hooi(D, RANK), tsv),
    }


def compare_dense() -> None:
    given = adapters(ADAPTERS, RANK, {"m": (WIDTH, WIDTH)})
    peers = dense_peers(torch.stack([a["m"].dense() for a in given]))
    print(f"\nOne {WIDTH} x {WIDTH} weight, {ADAPTERS} adapters of rank {RANK}\n")
    print("| method | seconds | on dense updates | times faster |\n|---|---|---|---|")
    merge_adapters("core_ties", given)  # threads and libraries awake
    for method in IN_FACTORS:
        fast = statistics.median(
            timed(lambda method=method: merge_adapters(method, given))[0] for _ in range(3)
        )
        slow, _ = timed(peers[method])
        print(f"| {method} | {fast:.3f} | {slow:.1f} | {slow / fast:.0f} |", flush=True)


_CHILD = """
import resource, sys, torch
from benchmarks.peers import *
method, n = sys.argv[1], int(sys.argv[2])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
merge_adapters(method, adapters(2, 2, {"m": (64, 64)}))
given = adapters(n, RANK, {"m": (WIDTH, WIDTH)})
before = peak()
seconds, _ = timed(lambda: merge_adapters(method, given))
print((peak() - before) / (4 * WIDTH * WIDTH), seconds)
"""


def memory() -> None:
    print(
        f"\nPeak memory of one {WIDTH} x {WIDTH} weight above its adapters, in dense float32 matrices (and seconds)\n"
    )
    print("| method | 2 adapters | 8 | 32 |\n|---|---|---|---|")
    for method in [m for m in METHODS if METHODS[m].result.dense] + IN_SMALL:
        cells = []
        for n in (2, 8, 32):
            child = subprocess.run(
                [sys.executable, "-c", _CHILD, method, str(n)], capture_output=True, text=True
            )
            if child.returncode:
                sys.exit(child.stderr)
            cells.append("{:.2f} ({:.1f} s)".format(*map(float, child.stdout.split())))
        print(f"| {method} | {' | '.join(cells)} |", flush=True)


def sets() -> None:
    shapes = {
        f"{layer}.{name}": shape
        for layer in range(32)
        for name, shape in (
            ("q", (4096, 4096)),
            ("k", (1024, 4096)),
            ("v", (1024, 4096)),
            ("o", (4096, 4096)),
        )
    }
    given = adapters(6, 16, shapes)
    print(
        "\nq, k, v, o of 32 layers with the shapes of Llama-3-8B, 6 adapters of rank 16: seconds for the merge\n"
    )
    print("| method | seconds |\n|---|---|")
    for method in ("core_tsv", "ctm_ties", "ctm_tsv", "core_ties", "knots_ties", "lora_task_arithmetic"):
        print(
            f"| {method} | {timed(lambda method=method: merge_adapters(method, given))[0]:.1f} |", flush=True
        )


if __name__ == "__main__":
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} CPU cores; python {' '.join(sys.argv)}")
    parts = {"dense": compare_dense, "memory": memory, "sets": sets}
    for name in sys.argv[1:] or parts:
        parts[name]()
