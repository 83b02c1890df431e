"""Whether a change of the code changed a byte of what any method writes.

    python benchmarks/same_bytes.py record build/before.json     # on the code as it was
    python benchmarks/same_bytes.py compare build/before.json    # on the code as it is; exits with 1 if a file differs

Every method of the table merges three sets of tiny adapters (of unequal ranks, of equal ranks, with magnitudes on
GPT-2's transposed weights) through `mergekit-multi` and through Python, with its defaults and with settings that take
other branches, under two seeds; every recipe of `yaml_examples` merges the example adapters.  Digests of tensors and
configurations are kept, not of model cards.  Rounding depends on the machine: record and compare on the same one.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from mergekit_tspa import METHODS, merge_adapters  # noqa: E402
from tests import conftest as tiny  # noqa: E402

SETTINGS = (
    {"lora_steps": 20, "attention_steps": 10, "adapter": True},
    {"scope": "model", "lora_steps": 20, "attention_steps": 10, "rank": 4, "k": 2, "c": 1, "seed": 7},
    {"pico": True, "svc": True, "lambda": 0.7, "convention": "peft", "balance": True, "elect": "count"},
    {
        "normalize": False,
        "convention": "mergekit",
        "beta": 0.5,
        "variant": "v1",
        "common_fraction": 0.8,
        "lambda": 2.0,
    },
    {"take": "max", "align_space": "input", "lora_target": "aligned", "target_scale": 2.0, "solver": "geoopt"}
    | {"lora_steps": 5, "attention_steps": 5},
)


def sets(folder: Path) -> dict[str, tuple[Path, list[Path]]]:
    """`{name: (base, adapters)}`."""
    llama = tiny.save_llama(folder / "llama")
    gpt2 = tiny.save_gpt2(folder / "gpt2")
    unequal = [
        tiny.save_adapter(llama, folder / "one", seed=1),
        tiny.save_adapter(llama, folder / "two", seed=2, r=2, target_modules=["q_proj", "up_proj"]),
        tiny.save_adapter(llama, folder / "three", seed=3, r=6, use_rslora=True, target_modules="all-linear"),
    ]
    equal = [
        tiny.save_adapter(llama, folder / f"e{seed}", seed=seed, target_modules="all-linear")
        for seed in (1, 2, 3)
    ]
    conv1d = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    dora = [
        tiny.save_adapter(gpt2, folder / f"d{seed}", seed=seed, use_dora=seed == 2, **conv1d)
        for seed in (1, 2)
    ]
    return {"unequal": (llama, unequal), "equal": (llama, equal), "gpt2": (gpt2, dora)}


def own(method: str, settings: dict) -> dict:
    known = {"adapter", *METHODS[method].parameter_fields()}
    return {key: value for key, value in settings.items() if key in known}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def written(directory: Path) -> dict[str, str]:
    files = (file for file in sorted(directory.rglob("*")) if file.suffix in (".safetensors", ".json"))
    return {str(file.relative_to(directory)): digest(file.read_bytes()) for file in files}


def run(command: str, *arguments: object) -> str | None:
    """None, or the error."""
    script = Path(sys.executable).parent / command
    done = subprocess.run([script, *map(str, arguments), "--quiet"], capture_output=True, text=True, cwd=ROOT)
    return done.stderr.splitlines()[-1] if done.returncode else None


def merges(folder: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for name, (base, adapters) in sets(folder).items():
        for number, settings in enumerate(SETTINGS):
            for method in METHODS:
                label = f"{name} {number} {method}"
                parameters = own(method, settings)
                if number and parameters == own(method, SETTINGS[0]):
                    continue
                out = folder / "out"
                weights = [1.0, 0.5, 0.8]
                config = tiny.recipe(method, base, adapters, weights, parameters=parameters)
                found[label] = stock(config, out)
                parameters.pop("adapter", None)
                found[f"{label} python"] = python(
                    method, adapters, weights[: len(adapters)], base, parameters
                )
            print(f"{name} {number}: {len(found)} merges", file=sys.stderr, flush=True)
    return found


def stock(config: dict, out: Path) -> dict[str, str]:
    result = tiny.merge(config, out)
    found = (
        written(out) if result.exit_code == 0 else {"error": str(result.output or result.exception)[-300:]}
    )
    shutil.rmtree(out, ignore_errors=True)
    return found


def python(
    method: str, adapters: list[Path], weights: list[float], base: Path, parameters: dict
) -> dict[str, str]:
    try:
        merged = merge_adapters(method, adapters, weights, base=base, **parameters)
    except ValueError as error:
        return {"error": str(error)}
    W = tiny.base_tensors(base)
    applied = {
        name: update.apply_to(W[f"{name}.weight"]) for name, update in merged.items() if f"{name}.weight" in W
    }
    return {name: digest(tensor.detach().contiguous().numpy().tobytes()) for name, tensor in applied.items()}


def examples(folder: Path) -> dict[str, dict[str, str]]:
    found = {}
    for recipe in sorted((ROOT / "yaml_examples").glob("*.yml")):
        documents = list(yaml.safe_load_all(recipe.read_text()))
        command = "mergekit-multi" if len(documents) > 1 else "mergekit-yaml"
        out = [folder / "example"]
        if command == "mergekit-multi":
            out = ["-I", folder / "parts", "--out-path", *out]
        error = run(command, recipe, *out)
        found[recipe.stem] = {"error": error} if error else written(folder)
        for part in ("example", "parts"):
            shutil.rmtree(folder / part, ignore_errors=True)
        print(recipe.stem, error or "", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    # One place for all runs: random draws depend on the adapters' names, and configurations name the base.
    work = Path(tempfile.gettempdir(), "mergekit_tspa-same-bytes")
    shutil.rmtree(work, ignore_errors=True)
    (work / "examples").mkdir(parents=True)
    found = merges(work) | examples(work / "examples")
    if args.what == "record":
        args.file.write_text(json.dumps(found, indent=1))
        return
    before = json.loads(args.file.read_text())
    changed = [label for label in before.keys() | found.keys() if before.get(label) != found.get(label)]
    for label in sorted(changed):
        print(f"{label}: {before.get(label)} -> {found.get(label)}"[:400])
    print(f"{len(changed)} of {len(found)} merges differ")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
