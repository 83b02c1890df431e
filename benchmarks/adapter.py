"""Time and peak memory of `mergekit-tspa check` and `mergekit-tspa adapter` on adapters of a large model's shapes.

    python benchmarks/adapter.py [--model 8b|70b|moe] [--adapters 8] [--rank 16] [--all-linear] [--methods NAME ...]

The base's header is real and its weights are a hole in a sparse file: the methods measured here must not look at them.
Merged updates are cut to the adapters' rank.  With experts (`moe`) they are made and not written.  The floor is what a
merge in small coordinates cannot do without, measured in the same run and with the same threads: every factor read once
from its file, and a QR in float32 of the stacked factors of each side of each tensor.  The last column is how far the
updates of one layer are from those of the same method with a QR in float64 in place of Gram matrices,
`||difference|| / ||update||`, the largest of the layer.

`regmean` reads no texts here: it gets statistics of random inputs, in files as `mergekit-tspa calibrate` writes them.
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
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.calibration.moments import RANK, SketchedInputs
from mergekit_tspa.calibration.store import hash_adapter, hash_base, save_statistics
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
    "regmean",
)
OF_LARGEST_RANK = ("ctm_tsv", "ctm_ties", "tspa_lora", "regmean")  # their updates have the adapters' rank


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
    exact, kept = {}, (linalg._WELL_CONDITIONED, linalg._NEARLY_ORTHOGONAL)
    try:
        linalg._WELL_CONDITIONED = linalg._NEARLY_ORTHOGONAL = 0  # always a QR
        exact = merge_plan(plan)[0]
    finally:
        linalg._WELL_CONDITIONED, linalg._NEARLY_ORTHOGONAL = kept
    return max(distance(merged[name], exact[name]) for name in exact)


def statistics_of(base: Path, adapters: list[Path], folder: Path) -> Iterator[Path]:
    """A file of statistics for each adapter: of random inputs, which tensors of one shape and layer share."""
    checkpoint = Checkpoint(base)
    of_base = hash_base(checkpoint)
    for path in adapters:
        adapter = read_adapter(path, path.name)
        generator = torch.Generator().manual_seed(int(path.name))
        known: dict[tuple[str, int], SketchedInputs] = {}
        inputs = {}
        for module, own in adapter.modules.items():
            d_in, block = own.shape[1], module.rsplit(".", 1)[0]
            if (block, d_in) not in known:
                U = torch.linalg.qr(torch.randn(d_in, RANK, generator=generator)).Q
                known[block, d_in] = SketchedInputs(
                    U, torch.rand(RANK, generator=generator), torch.rand(d_in), 1
                )
            inputs[f"{module}.weight"] = known[block, d_in]
        file = folder / f"{path.name}.calibration.safetensors"
        save_statistics(file, inputs, of_base, hash_adapter(adapter))
        yield file


def distance(one, other) -> float:
    """`||one - other|| / ||other||`, of low-rank updates."""
    B = torch.cat([one.B.double(), -other.B.double()], dim=1)
    A = torch.cat([one.A.double(), other.A.double()])
    difference = (torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT).norm()
    return (difference / other.norm()).item()


def rows(folder: Path, base: Path, adapters: list[Path], args) -> Iterator[str]:
    models: list[dict] = [{"model": f"{base}+{a}"} for a in adapters]
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
        parameters: dict = {} if method in OF_LARGEST_RANK else {"rank": args.rank}
        if method == "regmean":
            parameters["lambda"] = 1.3
            for model, file in zip(models, statistics_of(base, adapters, folder)):
                model["parameters"] = {"calibration": str(file)}
        recipe.write_text(
            yaml.safe_dump({"merge_method": method, "models": models, "parameters": parameters})
        )
        size = None
        if args.model == "moe":  # the updates alone
            seconds, peak = measure(sys.executable, "-c", updates_only(method, adapters, base, parameters))
        else:
            seconds, peak = measure(script, "adapter", str(recipe), str(out), "--quiet")
            size = (out / "adapter_model.safetensors").stat().st_size / MiB
        off = "-" if method == "regmean" else f"{error(method, adapters, parameters):.0e}"
        written = "-" if size is None else f"{size:.0f}"
        yield f"| {method} | {seconds:.1f} | {seconds / least:.2f} | {peak:.0f} | {written} | {off} |"
    if size is not None:
        seconds = writing(out / "adapter_model.safetensors")
        yield f"| (writing {size:.0f} MiB) | {seconds:.1f} | {seconds / least:.2f} | - | - | - |"


def updates_only(method: str, adapters: list[Path], base: Path, parameters: dict) -> str:
    """A program that merges, and writes nothing."""
    given = f"{method!r}, {[*map(str, adapters)]!r}, base={str(base)!r}, **{parameters!r}"
    return f"from mergekit_tspa import merge_adapters\nmerge_adapters({given})"


def main() -> None:
    with large_adapters(__doc__, METHODS_MEASURED) as (folder, base, adapters, args):
        print(
            "| method | seconds | times the floor | peak MiB | adapter MiB | error |\n|---|---|---|---|---|---|"
        )
        for row in rows(folder, base, adapters, args):
            print(row, flush=True)


if __name__ == "__main__":
    main()
