"""Held-out losses of merged models, one row a method and one column a set of adapters.

    python benchmarks/quality.py --base MODEL --scorer SCORE.py --adapters DIR [DIR ...] [-n 24] [--methods NAME ...] [--singles]

Each DIR holds one adapter per task.  Losses are kept in --results as they come; an interrupted run goes on where it
was.  SCORE.py is called as `SCORE.py --base MODEL -n N MERGED..` and prints a JSON
line with `mean_loss` and `loss` by task per merged model, after one for the base; the held-out texts are its own.  Every
method of the table is run as it is, and some again with a setting that suits them; rows are sorted by the first column.
The base and the single adapters, each on the task of its name, are rows too; with `--singles` they are the only ones.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import yaml
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_tspa import METHODS

BATCH = 6  # merged models on disk at a time
BASE, SINGLE = "base", "single adapter, on its own task"
SETTINGS = [  # method, weight, parameters
    ("lora_task_arithmetic", 0.5, {}),
    ("lora_task_arithmetic", 0.25, {}),
    ("lora_task_arithmetic", 0.5, {"rank": 8}),
    ("lora_ties", 1.0, {"scope": "model"}),
    ("lora_pcb", 1.0, {"scope": "model"}),
    ("lora_pcb", 1.0, {"variant": "v1"}),
    ("knots_ties", 1.0, {"scope": "model"}),
    ("core_ties", 1.0, {"balance": True}),
    ("core_tsv", 1.0, {"rank": 8}),
    ("ctm_ties", 1.0, {"density": 0.25, "beta": 0.25}),
    ("ctm_task_arithmetic", 0.5, {}),
    ("lora_dare_linear", 0.5, {}),
    ("lora_breadcrumbs", 0.5, {}),
    ("tspa", 1.0, {"target_scale": 1.0}),
    ("tspa_attention", 1.0, {"target_scale": 1.0}),
    ("tspa_lora", 1.0, {"target_scale": 1.0}),
    ("tspa", 1.0, {"target_scale": 1.0, "lora_target": "aligned"}),
]
# Rules that do not depend on the basis are one method under three names.
SAME = {
    f"{space}_{rule}" for space in ("knots", "core") for rule in ("task_arithmetic", "mean", "iso", "cart")
}
SAME |= {"lora_tsv", "knots_tsv"}


def rows(only: list[str]) -> Iterator[tuple[str, float, dict]]:
    for method, weight, parameters in [*((name, 1.0, {}) for name in METHODS), *SETTINGS]:
        if method in only if only else method not in SAME:
            yield method, weight, parameters


def label(method: str, weight: float, parameters: dict) -> str:
    changed = {"weight": weight} if weight != 1 else {}
    return ", ".join([method, *(f"{name} {value}" for name, value in {**changed, **parameters}.items())])


def merge(base: Path, adapters: list[Path], out: Path, method: str, weight: float, parameters: dict) -> bool:
    """Run the stock command; False if the method refuses these adapters."""
    models = [{"model": f"{base}+{adapter}"} for adapter in adapters]
    config = {"merge_method": method, "models": models, "parameters": {"weight": weight, **parameters}}
    recipe = out.with_suffix(".yml")
    recipe.write_text(yaml.safe_dump(config))
    try:
        mergekit_yaml([str(recipe), str(out), "--quiet"], standalone_mode=False)
    except Exception as error:
        print(f"{label(method, weight, parameters)}: {error}", file=sys.stderr)
        return False
    return True


def alone(scorer: Path, base: Path, n: int, adapters: list[Path]) -> dict[str, float]:
    """Mean losses of the base, and of the adapters each on the task that its directory is named after."""
    command = [
        sys.executable,
        scorer,
        "--base",
        base,
        "-n",
        str(n),
        "--tasks",
        ",".join(a.name for a in adapters),
    ]
    lines = subprocess.run(
        [*command, *adapters], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    of_base, *losses = (json.loads(line)["loss"] for line in lines)
    own = [loss[adapter.name] for adapter, loss in zip(adapters, losses)]
    return {BASE: sum(of_base.values()) / len(of_base), SINGLE: sum(own) / len(own)}


def score(scorer: Path, base: Path, n: int, models: list[Path]) -> list[float]:
    """Mean losses of merged models."""
    command = [sys.executable, scorer, "--base", base, "-n", str(n), *models]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [json.loads(line)["mean_loss"] for line in lines[-len(models) :]]


def keep(results: Path, losses: dict[str, dict[str, float]]) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(losses, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--scorer", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, nargs="+", required=True)
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--results", type=Path, default=Path("build/quality.json"))
    parser.add_argument("-n", type=int, default=24)
    parser.add_argument("--singles", action="store_true", help="only the base and the single adapters")
    args = parser.parse_args()
    settings = [] if args.singles else list(rows(args.methods))
    losses = json.loads(args.results.read_text()) if args.results.exists() else {}  # {set: {label: loss}}
    for folder in args.adapters:
        known = losses.setdefault(folder.name, {})
        if not {BASE, SINGLE} <= known.keys():
            known.update(alone(args.scorer, args.base, args.n, sorted(folder.iterdir())))
            keep(args.results, losses)
        todo = [row for row in settings if label(*row) not in known]
        for batch in (todo[start : start + BATCH] for start in range(0, len(todo), BATCH)):
            with tempfile.TemporaryDirectory() as work:
                outs = [Path(work, str(i)) for i in range(len(batch))]
                done = [
                    merge(args.base, sorted(folder.iterdir()), out, *row) for out, row in zip(outs, batch)
                ]
                scored = score(args.scorer, args.base, args.n, [out for out, ok in zip(outs, done) if ok])
            merged = [row for row, ok in zip(batch, done) if ok]
            known.update({label(*row): loss for row, loss in zip(merged, scored)})
            keep(args.results, losses)
            print(f"{folder.name}: {len(known)} of {len(settings)}", file=sys.stderr, flush=True)
    names = [folder.name for folder in args.adapters]
    print(f"{date.today()}, {args.n} examples a task\n")
    print(f"| method, weight 1 unless told | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    first = losses[names[0]]
    for row in sorted(
        {BASE, SINGLE, *(label(*row) for row in settings)} & first.keys(), key=first.__getitem__
    ):
        print(f"| {row} | {' | '.join(f'{losses[name][row]:.3f}' for name in names)} |")


if __name__ == "__main__":
    main()
