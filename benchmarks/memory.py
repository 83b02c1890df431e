"""Peak memory of whole `mergekit-yaml` runs, and what the plugin costs at `import torch`.

    python benchmarks/memory.py [--layers 4] [--adapters 4] [--rank 16]

Merges random adapters on all linear layers of a random Llama with the layer shapes of Llama-3-8B, in shards of
0.5 GB, and compares the peak resident memory of each run with that of importing mergekit.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import yaml
from synthetic import LLAMA_3_8B, linear_shapes, write_adapters, write_llama

MiB = 2**20
METHODS = ("lora_task_arithmetic", "factor_linear", "tspa_lora")


# A forked process starts with its parent's resident size as its peak, so a small one starts the command.
_LAUNCH = """
import os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(time.perf_counter() - start, usage.ru_maxrss / 1024)
sys.exit(bool(status))
"""


def measure(*command: str) -> tuple[float, float]:
    """Wall seconds and peak resident MiB of one process."""
    launched = subprocess.run([sys.executable, "-c", _LAUNCH, *command], capture_output=True, text=True)
    if launched.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{launched.stderr}")
    seconds, peak = map(float, launched.stdout.split())
    return seconds, peak


def entry_point_cost(runs: int = 9) -> float:
    """Milliseconds that `import torch` spends on the plugin: loading its module and calling `install`."""
    code = (
        "import time, importlib.metadata as m; (e,) = [e for e in m.entry_points(group='torch.backends')"
        " if e.name == 'mergekit_tspa']; start = time.perf_counter(); e.load()(); print(time.perf_counter() - start)"
    )
    times = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(runs)]
    return 1e3 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    modules = tuple(name.split(".")[-1] for name in linear_shapes(**LLAMA_3_8B))

    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} CPU cores; python {' '.join(sys.argv)}")
    print(f"entry point at `import torch`: {entry_point_cost():.2f} ms")
    _, imported = measure(sys.executable, "-c", "import mergekit.scripts.run_yaml")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        folder = Path(folder)
        base = write_llama(folder / "base", args.layers, **LLAMA_3_8B)
        adapters = list(
            write_adapters(folder / "adapters", args.adapters, args.layers, args.rank, modules, **LLAMA_3_8B)
        )
        shard = max(f.stat().st_size for f in base.glob("*.safetensors")) / MiB
        files = sum((a / "adapter_model.safetensors").stat().st_size for a in adapters) / MiB
        bound = imported + shard + files + 1024
        print(
            f"importing mergekit {imported:.0f} MiB, largest base shard {shard:.0f} MiB, adapters {files:.0f} MiB"
        )
        print("\n| method | peak MiB | above import | bound (import + shard + adapters + 1 GiB) | seconds |")
        print("|---|---|---|---|---|")
        for method in METHODS:
            recipe = folder / f"{method}.yml"
            models = [{"model": f"{base}+{a}"} for a in adapters]
            recipe.write_text(yaml.safe_dump({"merge_method": method, "models": models}))
            script = str(Path(sys.executable).parent / "mergekit-yaml")
            seconds, peak = measure(
                script, str(recipe), str(folder / method), "--out-shard-size", "250M", "--quiet"
            )
            print(
                f"| {method} | {peak:.0f} | {peak - imported:.0f} | {bound:.0f} | {seconds:.1f} |", flush=True
            )


if __name__ == "__main__":
    main()
