"""Whether the steps of many small merges gain from being one batch: the experts of one layer of Qwen3-30B-A3B's shapes.

    python benchmarks/batches.py [--experts 128] [--adapters 4] [--rank 16] [--threads 1] [--device cpu]

Each row is one step of a merge in small coordinates, of all experts one after the other and as one batch, the faster of
three turns each.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import date

import torch
from synthetic import QWEN3_30B_A3B


def seconds(step: Callable[[], object], wait: Callable[[], None]) -> float:
    taken = []
    for _ in range(4):  # the first is a warm-up
        start = time.perf_counter()
        step()
        wait()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} CPU cores; python {' '.join(sys.argv)}\n")
    d, R = QWEN3_30B_A3B["hidden"], args.adapters * args.rank
    X = torch.randn(args.experts, d, R, dtype=torch.float64, device=args.device)
    G = X.mT @ X  # (experts, R, R)
    K = G[:, :, : args.rank].contiguous()
    steps: dict[str, tuple[torch.Tensor, Callable[[torch.Tensor], object]]] = {
        f"Gram matrix of ({d}, {R})": (X, lambda x: x.mT @ x),
        f"Cholesky factor of ({R}, {R})": (G, torch.linalg.cholesky_ex),
        f"eigenvectors of ({R}, {R})": (G, torch.linalg.eigh),
        f"QR of ({R}, {args.rank})": (K, torch.linalg.qr),
    }
    wait = torch.cuda.synchronize if X.is_cuda else lambda: None
    print("| step | one by one, ms a tensor | as a batch, ms a tensor | gain |\n|---|---|---|---|")
    for name, (given, step) in steps.items():
        alone = seconds(lambda: [step(x) for x in given], wait) / args.experts  # noqa: B023
        batch = seconds(lambda: step(given), wait) / args.experts  # noqa: B023
        print(f"| {name} | {1e3 * alone:.3f} | {1e3 * batch:.3f} | {alone / batch:.2f} |", flush=True)


if __name__ == "__main__":
    main()
