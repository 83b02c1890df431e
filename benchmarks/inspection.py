"""Time and peak memory of `mergekit-tspa inspect` on adapters of Llama-3-8B's shapes.

    python benchmarks/inspection.py [--adapters 8] [--rank 16] [--methods NAME ...]

Adapters on q, k, v and o of all 32 layers: by themselves, and as inputs of recipes.  The base's header is real and its
weights are a hole in a sparse file.
"""

import re
import sys
from pathlib import Path

import yaml
from memory import measure
from synthetic import large_adapters

METHODS = ("core_tsv", "ctm_ties", "lora_ties", "tspa_lora", "tspa")


def main() -> None:
    with large_adapters(__doc__, METHODS) as (folder, base, adapters, args):
        inputs = {"(adapters alone)": [*map(str, adapters)]}
        for method in args.methods:
            recipe = folder / f"{method}.yml"
            models = [{"model": f"{base}+{adapter}"} for adapter in adapters]
            recipe.write_text(yaml.safe_dump({"merge_method": method, "models": models}))
            inputs[method] = [str(recipe)]
        script = str(Path(sys.executable).parent / "mergekit-tspa")
        print("| recipe | seconds | peak MiB | layers merged |\n|---|---|---|---|")
        for name, given in inputs.items():
            seconds, peak = measure(script, "inspect", *given, "--out", str(folder / "report"), "--quiet")
            page = (folder / "report/inspect.html").read_text()
            merged = re.search(r"measured on (\d+) of 32 layers", page)
            layers = merged[1] if merged else "-" if name.startswith("(") else "32"
            print(f"| {name} | {seconds:.1f} | {peak:.0f} | {layers} |", flush=True)


if __name__ == "__main__":
    main()
