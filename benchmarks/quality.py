"""Held-out losses of merged models, one row a method and one column a set of adapters.

    python benchmarks/quality.py --base MODEL --scorer SCORE.py --adapters DIR [DIR ...] [-n 24]

Each DIR holds one adapter per task.  SCORE.py is called as `SCORE.py --base MODEL -n N MERGED` and prints a JSON
line with `mean_loss` per merged model; the held-out texts are its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import yaml

ROWS = [  # what the row is called, method, weight, parameters
    ("factor_linear", "factor_linear", 1.0, {}),
    ("lora_task_arithmetic", "lora_task_arithmetic", 1.0, {}),
    ("lora_task_arithmetic, weight 0.5", "lora_task_arithmetic", 0.5, {}),
    ("lora_task_arithmetic, weight 0.25", "lora_task_arithmetic", 0.25, {}),
    ("tspa_lora", "tspa_lora", 1.0, {}),
    ("tspa_lora, target_scale 2", "tspa_lora", 1.0, {"target_scale": 2.0}),
    ("tspa_attention", "tspa_attention", 1.0, {}),
    ("tspa", "tspa", 1.0, {}),
    ("tspa, lora_target aligned", "tspa", 1.0, {"lora_target": "aligned"}),
    ("tspa_pairwise", "tspa_pairwise", 1.0, {}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--scorer", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, nargs="+", required=True)
    parser.add_argument("-n", type=int, default=24)
    args = parser.parse_args()
    names = [folder.name for folder in args.adapters]
    print(f"{date.today()}, {args.n} examples a task\n")
    print(f"| method | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    mergekit = str(Path(sys.executable).parent / "mergekit-yaml")
    for label, method, weight, parameters in ROWS:
        losses = []
        for folder in args.adapters:
            with tempfile.TemporaryDirectory() as work:
                recipe, out = Path(work, "recipe.yml"), Path(work, "out")
                models = [{"model": f"{args.base}+{adapter}"} for adapter in sorted(folder.iterdir())]
                settings = {"weight": weight, **parameters}
                recipe.write_text(yaml.safe_dump({"merge_method": method, "models": models, "parameters": settings}))
                subprocess.run([mergekit, recipe, out, "--quiet"], check=True, capture_output=True)
                command = [sys.executable, args.scorer, "--base", args.base, "-n", str(args.n), out]
                lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
                losses.append(json.loads(lines[-1])["mean_loss"])
        print(f"| {label} | {' | '.join(f'{loss:.3f}' for loss in losses)} |", flush=True)


if __name__ == "__main__":
    main()
