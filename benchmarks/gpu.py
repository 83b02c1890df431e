"""Methods on a GPU against the CPU: how far the results are apart, and seconds.

    python benchmarks/gpu.py methods [--layers 1]      # every method without texts, on shapes of Llama-3-8B
    python benchmarks/gpu.py whole                     # all 32 layers: some methods, and TSPA's paper case

A difference is `||M_gpu - M_cpu|| / ||M_cpu||` over all tensors.  A GPU draws other random numbers than a CPU, so results
of methods that draw are two draws of one distribution.  The adapters share a part, as those of one initialisation do.
`methods` runs several processes at once, so its seconds say little; `whole` times the second of two runs on the GPU, as
the first one loads its libraries.
"""

import argparse
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import date
from math import nan
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from alignment import GEOMETRY, RepeatedLayer, solve
from synthetic import ALL_LINEAR, ATTENTION, LLAMA_3_8B, linear_shapes

from mergekit_tspa import METHODS, MergedAdapters, merge_adapters

WHOLE = ("lora_task_arithmetic", "core_tsv", "ctm_tsv", "tspa_lora", "core_ties", "knots_ties")
DRAWS = ("dare", "della")

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def adapters(count: int, layers: int, rank: int, modules: Sequence[str]) -> list[Factors]:
    """Random ones, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    made: list[Factors] = [{} for _ in range(count)]
    for layer in range(layers):
        for module, (d_out, d_in) in linear_shapes(**LLAMA_3_8B).items():
            if module.split(".")[-1] not in modules:
                continue
            draws = 0.02 * torch.randn(count + 1, rank * (d_out + d_in), generator=generator)
            for adapter, own in zip(made, draws[1:]):
                B, A = (draws[0] + own).split([d_out * rank, rank * d_in])
                adapter[f"model.layers.{layer}.{module}"] = (B.view(d_out, rank), A.view(rank, d_in))
    return made


def timed(method: str, given: Sequence[Any], device: str, **more: Any) -> tuple[float, MergedAdapters]:
    start = time.perf_counter()
    merged = merge_adapters(method, given, device=device, **more)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, merged


def apart(gpu: MergedAdapters, cpu: MergedAdapters) -> float:
    """`||M_gpu - M_cpu|| / ||M_cpu||`"""
    squares = torch.zeros(2, dtype=torch.float64)
    for module, expected in cpu.items():
        M, found = expected.dense(), gpu[module].dense().cpu()
        squares += torch.stack([(found - M).double().square().sum(), M.double().square().sum()])
    return float((squares[0] / squares[1]).sqrt())


class Line(NamedTuple):
    """What was found of a method."""

    method: str
    apart: str
    cpu: float = nan  # seconds
    gpu: float = nan


def line(method: str, given: Sequence[Any], device: str, repeat: bool = False, **more: Any) -> Line:
    try:
        cpu_seconds, cpu = timed(method, given, "cpu", **more)
        gpu_seconds, gpu = timed(method, given, device, **more)
        if repeat:
            gpu_seconds, gpu = timed(method, given, device, **more)
        drawn = " (drawn)" if any(word in method for word in DRAWS) else ""
        return Line(method, f"{apart(gpu, cpu):.1e}{drawn}", cpu_seconds, gpu_seconds)
    except Exception as error:  # the others are still of interest
        return Line(method, f"{type(error).__name__}: {str(error).splitlines()[0]}")


def lines(found: Iterable[Line]) -> None:
    print("| method | apart | CPU, s | GPU, s |\n|---|---|---|---|")
    for own in found:
        print(f"| {own.method} | {own.apart} | {own.cpu:.2f} | {own.gpu:.2f} |", flush=True)
    print()


def methods(args: argparse.Namespace) -> None:
    print(f"four adapters of rank 16 on q, k, v, o of {args.layers} layers, {args.workers} processes\n")
    names = args.only or [name for name, method in METHODS.items() if not method.guided]
    with get_context("spawn").Pool(args.workers) as pool:
        jobs = [(name, args.layers, args.device) for name in names]
        lines(pool.imap_unordered(_method, jobs))


def _method(job: tuple[str, int, str]) -> Line:
    name, layers, device = job
    torch.set_num_threads(1)
    given = adapters(4, layers, 16, ATTENTION)
    return line(name, given, device, base=RepeatedLayer("cpu"), geometry=GEOMETRY)


def whole(args: argparse.Namespace) -> None:
    print("tspa, the paper's case: rank 8 on q and v of 32 layers, Grams of the base included\n")
    print("| adapters | seconds |\n|---|---|")
    base = RepeatedLayer(args.device)
    solve(base, 2, 8, "qv", args.device)
    for count in (2, 4, 8):
        print(f"| {count} | {solve(base, count, 8, 'qv', args.device)[0]:.2f} |", flush=True)
    print("\nfour adapters of rank 16 on all linear tensors of 32 layers\n")
    given = adapters(4, 32, 16, ALL_LINEAR)
    lines(line(name, given, args.device, repeat=True) for name in args.only or WHOLE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("methods", "whole"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="methods")
    parser.add_argument("--workers", type=int, default=8, help="of `methods`, which are not timed alone then")
    args = parser.parse_args()
    gpu = torch.cuda.get_device_name(args.device) if args.device != "cpu" else "no GPU"
    print(
        f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, {gpu}; torch {torch.__version__}; "
        f"python {' '.join(sys.argv)}\n",
        flush=True,
    )
    {"methods": methods, "whole": whole}[args.what](args)


if __name__ == "__main__":
    main()
