"""How the time of a merge grows with the number of adapters and with their rank, on one tensor of 4096 x 4096.

    python benchmarks/growth.py [--methods NAME ...] [--picture benchmarks/results/growth.png]

Seconds of the processor (all threads), the median of three merges.  Merged updates are cut to the adapters' rank.  The
exponent is the slope of log seconds over log size, fitted to the upper half of the sizes, where the fixed costs of a call
no longer count; the picture has lines of slope 2 and 3 beside it.  With n adapters of rank r, R = n r is at most the
tensor's sides here.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from mergekit_tspa import LoraFactors, merge_adapters

WIDTH = 4096
COUNTS, RANK = (2, 4, 8, 16, 32, 64), 16
RANKS, COUNT = (8, 16, 32, 64, 128), 8
# What theory says of the leading term: powers of n and of r.
METHODS = {
    "lora_task_arithmetic": "d n^2 r^2: Gram matrices of the stacked factors",
    "core_tsv": "d n^2 r^2, and n^3 r^3 of the eigenvectors in the core",
    "core_ties": "d n^2 r^2, and n^3 r^3: n updates of n r by n r entries",
    "ctm_tsv": "d n^2 r^2, and n^3 r^3 for the first subspaces",
    "tspa_lora": "n^2 r^3 a step: products of r by r matrices",
}
OF_LARGEST_RANK = ("ctm_tsv", "tspa_lora")


def adapters(n: int, r: int) -> list[dict[str, LoraFactors]]:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g) / shape[-1] ** 0.5  # noqa: E731
    return [{"m": LoraFactors(draw(WIDTH, r), draw(r, WIDTH))} for _ in range(n)]


def seconds(method: str, n: int, r: int) -> float:
    given = adapters(n, r)
    parameters = {} if method in OF_LARGEST_RANK else {"rank": r}
    taken = []
    for _ in range(3):
        start = time.process_time()
        merge_adapters(method, given, **parameters)
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def exponent(sizes: tuple[int, ...], times: list[float]) -> float:
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(times[half:]), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="*", default=[*METHODS])
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} CPU cores; python {' '.join(sys.argv)}\n")
    print(
        f"| method | {' | '.join(f'n = {n}' for n in COUNTS)} | exponent of n "
        f"| {' | '.join(f'r = {r}' for r in RANKS)} | exponent of r | theory |"
    )
    print("|---" * (4 + len(COUNTS) + len(RANKS)) + "|")
    _, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for method in args.methods:
        by_count = [seconds(method, n, RANK) for n in COUNTS]
        by_rank = [seconds(method, COUNT, r) for r in RANKS]
        print(
            f"| {method} | {' | '.join(f'{s:.3f}' for s in by_count)} | {exponent(COUNTS, by_count):.1f} "
            f"| {' | '.join(f'{s:.3f}' for s in by_rank)} | {exponent(RANKS, by_rank):.1f} | {METHODS[method]} |",
            flush=True,
        )
        for axes, sizes, times in ((left, COUNTS, by_count), (right, RANKS, by_rank)):
            axes.loglog(sizes, times, marker="o", label=f"{method}: {exponent(sizes, times):.1f}")
            axes.set_xscale("log", base=2)
    left.set(xlabel=f"adapters of rank {RANK}", ylabel="seconds")
    right.set(xlabel=f"rank of {COUNT} adapters")
    for axes, sizes in ((left, COUNTS), (right, RANKS)):
        end = axes.get_ylim()[1]
        for power, style in ((2, "--"), (3, ":")):  # what theory says, through the upper right corner
            lines = [end * (size / sizes[-1]) ** power for size in sizes]
            axes.plot(sizes, lines, style, color="gray", label=f"slope {power}")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.legend(frameon=False, title="exponent of the upper half")
        axes.grid(alpha=0.3)
    if args.picture:
        plt.tight_layout()
        plt.savefig(args.picture, dpi=120)


if __name__ == "__main__":
    main()
