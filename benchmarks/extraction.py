"""Factors of a full model: `mergekit-extract-lora` and ours, seconds and error at equal rank.

    python benchmarks/extraction.py [--base build/models/SmolLM2-135M-Instruct] [--ranks 8 32 128] [--runs 3]

The full model is the base with an adapter of rank 8 merged, and dense noise of a given share of its energy on top.
Each time is that of a whole process, imports and files included; in brackets without what `--help` of the same program
takes.  The runs take turns.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mergekit_tspa.adapters import Extraction, extract_adapter, read_adapter
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.tensors import ModelTensors

RESULTS = Path(__file__).parent / "results/extraction.md"
HEADER = "| noise's share of the energy | rank | seconds, stock | seconds, ours | ratio | error, stock | error, ours |"


def make_full(base: Path, adapter: Path, noise: float, path: Path) -> Path:
    """The base with the adapter merged, and noise of `noise` of the adapter's energy on every linear weight."""
    from transformers import AutoModelForCausalLM  # slow to import, and no part of what is measured

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights = {name: W for name, W in model.named_parameters() if W.ndim == 2 and "embed" not in name}
    lora, tensors = read_adapter(adapter).fit(ModelTensors.of(str(base), Checkpoint(base)))
    updates = {name: lora.factors(module).dense() for name, module in tensors.items()}
    energy = sum(update.square().sum() for update in updates.values()) / sum(
        W.numel() for W in weights.values()
    )
    with torch.no_grad():
        for name, W in weights.items():
            W += updates.get(name, 0) + (noise * energy).sqrt() * torch.randn_like(W)
    model.save_pretrained(path)
    return path


def ours(base: Path, full: Path, rank: int, out: Path) -> None:
    """All factors, to a file."""
    sides = (ModelTensors.of(str(path), Checkpoint(path)) for path in (full, base))
    adapter = extract_adapter(str(full), *sides, Extraction(rank))
    factors = {module: adapter.factors(module) for module in adapter.modules}
    save_file(
        {f"{m}.{side}": getattr(f, side).contiguous() for m, f in factors.items() for side in "AB"}, out
    )


def seconds(*command: str | Path) -> float:
    start = time.perf_counter()
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command} failed:\n{done.stderr}")
    return time.perf_counter() - start


def error(base: Path, full: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> float:
    """`||B A - D|| / ||D||` over all linear weights."""
    W, W_base = Checkpoint(full), Checkpoint(base)
    left = total = 0.0
    for module, (B, A) in factors.items():
        D = W[f"{module}.weight"].float() - W_base[f"{module}.weight"].float()
        left += (B @ A - D).square().sum().item()
        total += D.square().sum().item()
    return (left / total) ** 0.5


def main() -> None:
    root = Path(__file__).parent.parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=root / "build/models/SmolLM2-135M-Instruct")
    parser.add_argument("--adapter", type=Path, default=root / "examples/adapters/math")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.01, 1.0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only-ours", nargs=3, metavar=("FULL", "RANK", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_ours:
        full, rank, out = args.only_ours
        return ours(args.base, Path(full), int(rank), Path(out))

    stock_command = Path(sys.executable).parent / "mergekit-extract-lora"
    own_command = [sys.executable, __file__, "--base", args.base]
    started = [
        statistics.median(seconds(*c, "--help") for _ in range(3)) for c in ([stock_command], own_command)
    ]
    threads = os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())
    lines = [
        f"`python {' '.join(sys.argv)}`, {date.today()}, {platform.machine()}, {threads} CPU threads; seconds: median "
        f"of {args.runs} runs in turn, in brackets without start and imports.",
        "",
    ]
    lines += [HEADER, "|" + "---|" * HEADER.count(" | ") + "---|"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for noise in args.noise:
            full = make_full(args.base, args.adapter, noise, folder / f"full-{noise}")
            for rank in args.ranks:
                stock_out, our_out = folder / f"stock-{rank}", folder / f"ours-{rank}.safetensors"
                stock = [stock_command, "--model", full, "--base-model", args.base]
                stock += ["--out-path", stock_out, "--max-rank", rank, "--device", "cpu"]
                own = [*own_command, "--only-ours", full, rank, our_out]
                times = [(seconds(*stock), seconds(*own)) for _ in range(args.runs)]
                took = [statistics.median(t) for t in zip(*times)]
                work = [t - s for t, s in zip(took, started)]
                saved = load_file(our_out)
                factors = {
                    key[:-2]: (saved[f"{key[:-2]}.B"], saved[key]) for key in saved if key.endswith(".A")
                }
                extracted = read_adapter(stock_out)
                errors = [
                    error(args.base, full, {module: extracted.factors(module) for module in factors}),
                    error(args.base, full, factors),
                ]
                row = [f"{noise:g}", f"{rank}", *(f"{t:.1f} ({w:.1f})" for t, w in zip(took, work))]
                row.append(f"{took[0] / took[1]:.1f} ({work[0] / work[1]:.1f})")
                lines.append("| " + " | ".join([*row, *(f"{e:.4f}" for e in errors)]) + " |")
                print(lines[-1], flush=True)
    RESULTS.write_text("# Factors of a full model\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
