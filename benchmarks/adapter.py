"""Time and peak memory of `mergekit-tspa check` and `mergekit-tspa adapter` on adapters of Llama-3-8B's shapes.

    python benchmarks/adapter.py [--adapters 8] [--rank 16] [--methods NAME ...]

Adapters on q, k, v and o of all 32 layers.  The base's header is real and its weights are a hole in a sparse file: the
methods measured here must not look at them.
"""

import sys
from pathlib import Path

import yaml
from memory import MiB, measure
from synthetic import large_adapters

METHODS = ("lora_task_arithmetic", "core_tsv", "core_ties", "ctm_tsv", "ctm_ties", "tspa_lora")
DENSE = ("lora_ties",)  # cut to the adapters' rank


def main() -> None:
    with large_adapters(__doc__, METHODS) as (folder, base, adapters, args):
        models = [{"model": f"{base}+{a}"} for a in adapters]
        script = str(Path(sys.executable).parent / "mergekit-tspa")
        print("| method | seconds | peak MiB | adapter MiB |\n|---|---|---|---|")
        recipe = folder / "check.yml"
        recipe.write_text(yaml.safe_dump({"merge_method": "core_tsv", "models": models}))
        seconds, peak = measure(script, "check", str(recipe))
        print(f"| (check) | {seconds:.1f} | {peak:.0f} | - |", flush=True)
        for method in args.methods:
            recipe, out = folder / f"{method}.yml", folder / method
            parameters = {"rank": args.rank} if method in DENSE else {}
            recipe.write_text(
                yaml.safe_dump({"merge_method": method, "models": models, "parameters": parameters})
            )
            seconds, peak = measure(script, "adapter", str(recipe), str(out), "--quiet")
            size = (out / "adapter_model.safetensors").stat().st_size / MiB
            print(f"| {method} | {seconds:.1f} | {peak:.0f} | {size:.0f} |", flush=True)


if __name__ == "__main__":
    main()
