"""Time and peak memory of `mergekit-tspa check` and `mergekit-tspa adapter` on adapters of a large model's shapes.

    python benchmarks/adapter.py [--model 8b|70b|moe] [--adapters 8] [--rank 16] [--all-linear] [--methods NAME ...]

The base's header is real and its weights are a hole in a sparse file: the methods measured here must not look at them.
Merged updates are cut to the adapters' rank.  The floor is what a merge in small coordinates cannot do without, measured
in the same run and with the same threads: every factor read once from its file, and a QR in float32 of the stacked
factors of each side of each tensor.  The last column is how far the updates of one layer are from those of the same
method with a QR in float64 in place of Gram matrices, `||difference|| / ||update||`, the largest of the layer.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from memory import MiB, measure
from synthetic import large_adapters

from mergekit_tspa import METHODS, linalg, read_adapter
from mergekit_tspa.merging.api import plan_adapters
from mergekit_tspa.merging.merge import merge_plan
from mergekit_tspa.updates import LoraFactors

METHODS_MEASURED = (
    "lora_task_arithmetic",
    "core_tsv",
    "core_ties",
    "knots_ties",
    "ctm_tsv",
    "ctm_ties",
    "tspa_lora",
)
OF_LARGEST_RANK = ("ctm_tsv", "ctm_ties", "tspa_lora")  # their updates have the adapters' rank


@torch.no_grad()
def floor(adapters: list[Path]) -> tuple[float, float]:
    """Seconds to read all factors once, and with a QR in float32 of the stacked factors of each side."""
    opened = [read_adapter(path, path.name) for path in adapters]
    reading, start = 0.0, time.perf_counter()
    for module in opened[0].modules:
        before = time.perf_counter()
        factors = [LoraFactors(*(side.clone() for side in a.factors(module))) for a in opened]
        reading += time.perf_counter() - before
        torch.linalg.qr(torch.cat([f.B for f in factors], dim=1))
        torch.linalg.qr(torch.cat([f.A for f in factors]).mT)
    return reading, time.perf_counter() - start


def writing(file: Path) -> float:
    """Seconds to write a file again and to wait until it is on the disk."""
    copy, start = file.with_suffix(".copy"), time.perf_counter()
    shutil.copyfile(file, copy)
    with open(copy, "rb+") as written:
        os.fsync(written.fileno())
    seconds = time.perf_counter() - start
    copy.unlink()
    return seconds


@torch.no_grad()
def error(method: str, adapters: list[Path], parameters: dict) -> float:
    """Of the first layer."""
    row = METHODS[method]
    opened = [read_adapter(path, path.name) for path in adapters]
    plan = plan_adapters(row, row.bind(parameters), opened, [a.tensors for a in opened], [1.0] * len(opened))
    plan = plan.only(lambda name: ".layers.0." in name and ".experts." not in name)
    merged = merge_plan(plan)[0]
    exact, kept = {}, linalg._WELL_CONDITIONED
    try:
        linalg._WELL_CONDITIONED = 0  # always a QR
        exact = merge_plan(plan)[0]
    finally:
        linalg._WELL_CONDITIONED = kept
    return max(distance(merged[name], exact[name]) for name in exact)


def distance(one, other) -> float:
    """`||one - other|| / ||other||`, of low-rank updates."""
    B = torch.cat([one.B.double(), -other.B.double()], dim=1)
    A = torch.cat([one.A.double(), other.A.double()])
    difference = (torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT).norm()
    return (difference / other.norm()).item()


def rows(folder: Path, base: Path, adapters: list[Path], args) -> Iterator[str]:
    models = [{"model": f"{base}+{a}"} for a in adapters]
    script = str(Path(sys.executable).parent / "mergekit-tspa")
    recipe = folder / "check.yml"
    recipe.write_text(yaml.safe_dump({"merge_method": "core_tsv", "models": models}))
    seconds, peak = measure(script, "check", str(recipe))
    yield f"| (check) | {seconds:.1f} | - | {peak:.0f} | - | - |"
    reading, least = floor(adapters)
    size = sum((adapter / "adapter_model.safetensors").stat().st_size for adapter in adapters) / MiB
    yield f"| (reading {size:.0f} MiB once) | {reading:.1f} | {reading / least:.2f} | - | - | - |"
    yield f"| (floor: reading and QR) | {least:.1f} | 1 | - | - | - |"
    for method in args.methods:
        recipe, out = folder / f"{method}.yml", folder / method
        parameters = {} if method in OF_LARGEST_RANK else {"rank": args.rank}
        recipe.write_text(
            yaml.safe_dump({"merge_method": method, "models": models, "parameters": parameters})
        )
        seconds, peak = measure(script, "adapter", str(recipe), str(out), "--quiet")
        size = (out / "adapter_model.safetensors").stat().st_size / MiB
        off = error(method, adapters, parameters)
        yield f"| {method} | {seconds:.1f} | {seconds / least:.2f} | {peak:.0f} | {size:.0f} | {off:.0e} |"
    seconds = writing(out / "adapter_model.safetensors")
    yield f"| (writing {size:.0f} MiB) | {seconds:.1f} | {seconds / least:.2f} | - | - | - |"


def main() -> None:
    with large_adapters(__doc__, METHODS_MEASURED) as (folder, base, adapters, args):
        print(
            "| method | seconds | times the floor | peak MiB | adapter MiB | error |\n|---|---|---|---|---|---|"
        )
        for row in rows(folder, base, adapters, args):
            print(row, flush=True)


if __name__ == "__main__":
    main()
