"""What a merge costs beside mergekit's own copy of the base (`passthrough`), as whole commands, in turns.

    python benchmarks/near_copy.py [--base MODEL --adapters DIR ...] [--async-write] [--runs 3]
        [--beside CHECKOUT]

With --base and --adapters that model and those adapters; otherwise four layers of Llama-3-8B's shapes and four adapters
of rank 64 on all linear layers.  Medians; the first turn is a warm-up.  With --async-write, mergekit's own option, one
shard is written while the next is made, by the copy as by the merges.  Every output goes to a new directory, under TMPDIR
if that is set: `TMPDIR=/dev/shm` leaves the disk out.  With --beside, another checkout of this project, such as one of an
earlier version, takes every turn too, and the copy it is compared with is of both checkouts, which copy alike.
"""

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path

import yaml
from memory import measure
from synthetic import ALL_LINEAR, LLAMA_3_8B, write_adapters, write_llama

METHODS = ("lora_task_arithmetic", "core_tsv", "tspa_lora", "tspa")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapters", type=Path, nargs="*")
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--async-write", action="store_true")
    parser.add_argument("--beside", type=Path)
    args = parser.parse_args()
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} CPU cores; python {' '.join(sys.argv)}\n")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        base = args.base or write_llama(folder / "base", 4, **LLAMA_3_8B)
        adapters = args.adapters or [*write_adapters(folder / "adapters", 4, 4, 64, ALL_LINEAR, **LLAMA_3_8B)]
        recipes = {"passthrough": {"merge_method": "passthrough", "models": [{"model": str(base)}]}}
        models = [{"model": f"{base}+{adapter}"} for adapter in adapters]
        recipes |= {method: {"merge_method": method, "models": models} for method in args.methods}
        checkouts = [Path(__file__).parents[1], *([args.beside.resolve()] if args.beside else [])]
        options = ["--async-write"] if args.async_write else []
        seen = compare(folder, recipes, checkouts, args.runs, options)
    copy = statistics.median(seconds for checkout in checkouts for seconds in seen[checkout, "passthrough"])
    print("| checkout | method | seconds | times the copy |\n|---|---|---|---|")
    for (checkout, method), seconds in seen.items():
        taken = statistics.median(seconds)
        print(f"| {checkout.name} | {method} | {taken:.1f} | {taken / copy:.2f} |")


def compare(
    folder: Path, recipes: dict[str, dict], checkouts: list[Path], runs: int, options: list[str]
) -> dict[tuple[Path, str], list[float]]:
    """Seconds of every run but the first, of each checkout and method."""
    script = str(Path(sys.executable).parent / "mergekit-yaml")
    command = [script, str(folder / "recipe.yml"), str(folder / "out")]
    command += ["--quiet", "--out-shard-size", "250M", *options]
    seen: dict[tuple[Path, str], list[float]] = {(c, method): [] for c in checkouts for method in recipes}
    for turn in range(runs + 1):
        for method, recipe in recipes.items():
            for checkout in checkouts:
                os.environ["PYTHONPATH"] = str(checkout)
                (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
                # A file that takes another's place costs more.
                shutil.rmtree(folder / "out", ignore_errors=True)
                seconds, _ = measure(*command)
                if turn:
                    seen[checkout, method].append(seconds)
    return seen


if __name__ == "__main__":
    main()
