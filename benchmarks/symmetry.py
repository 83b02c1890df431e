"""Alignment of whole models: what it costs at the shapes of Llama-3-8B, and what it does to loss barriers.

    python benchmarks/symmetry.py cost [--units 3584 7168 14336]
    python benchmarks/symmetry.py barrier --texts DIR [--steps 600]
    python benchmarks/symmetry.py model [--base build/models/SmolLM2-135M-Instruct] [--adapter examples/adapters/math]

`cost` aligns one MLP and one attention block of random values, a process for each row.  `barrier` trains tiny Llamas on
bytes of DIR/*.train.jsonl, from a common start or apart, aligns one to the other, and reads DIR/*.dev.jsonl with models on
the straight line between the two.  `model` moves and turns the units and heads of a real model with an adapter merged, in
its own dtype, and aligns it back to the base.  Each part writes its section of benchmarks/results/symmetry.md; `barrier` also draws
docs/align/barrier.png.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mergekit_tspa.adapters import read_adapter
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.geometry import AttentionGeometry
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.symmetry.align import AlignedModel, align_attention, align_mlp
from mergekit_tspa.symmetry.alignment_report import summary
from mergekit_tspa.symmetry.blocks import KINDS, Block

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/symmetry.md"
WIDTH, LAYERS = 4096, 32
HEADS = AttentionGeometry(32, 8, 128, 128)


def seconds(do: Callable[[], object]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def measured(do: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and the GiB that it takes beside what is there (Linux)."""

    def size(line: str) -> float:
        return int(re.search(rf"{line}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, took = size("VmRSS"), seconds(do)
    return took, size("VmHWM") - before


# -- cost --------------------------------------------------------------------------------------------------


def rows(count: int, related: bool, shapes: dict[str, int], seed: int = 0) -> tuple[dict, dict]:
    """An anchor, and a model: the anchor with a fifth of noise and its units moved, or another one."""
    draw = torch.Generator().manual_seed(seed)
    anchor = {role: torch.randn(n, WIDTH, generator=draw) for role, n in shapes.items()}
    model = {role: torch.randn(n, WIDTH, generator=draw) for role, n in shapes.items()}
    if related:
        p = torch.randperm(count, generator=draw)
        for role, W in anchor.items():
            model[role] = (W + 0.2 * model[role]).unflatten(0, (count, -1))[p].flatten(0, 1)
    return model, anchor


def measure_mlp(units: int, related: bool) -> dict[str, float]:
    model, anchor = rows(units, related, dict.fromkeys(("gate", "up", "down"), units))
    took, memory = measured(lambda: align_mlp(model, anchor))
    S = sum(anchor[role] @ model[role].T for role in model)
    cost = S.double().neg_().numpy()
    del S
    return {
        "seconds": took,
        "scipy": seconds(lambda: linear_sum_assignment(cost)),
        "memory": memory,
    }


def measure_attention(related: bool) -> dict[str, float]:
    n, m, d = HEADS[:3]
    # groups stay together when the keys' heads move
    model, anchor = rows(m, related, {"q": n * d, "k": m * d, "v": m * d, "o": n * d})
    block = Block("attention", {}, HEADS)
    took, memory = measured(lambda: align_attention(model, anchor, block, KINDS))
    return {"seconds": took, "memory": memory}


def cost(units: list[int]) -> str:
    lines = [
        "| block | models | seconds | scipy's assignment alone, of the same products | memory beside the tensors, GiB |",
        "|---|---|---|---|---|",
    ]
    layer = {}
    for related in (True, False):
        kind = "related, moved" if related else "unrelated"
        total = 0.0
        for size in (*units, 0):
            command = [sys.executable, __file__, "row", str(size), str(int(related))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            name = f"MLP, {size} units" if size else "attention, 32 heads of 128 in 8 groups"
            scipy = f"{found['scipy']:.1f}" if size else "–"
            lines.append(f"| {name} | {kind} | {found['seconds']:.1f} | {scipy} | {found['memory']:.2f} |")
            print(lines[-1], flush=True)
            total += found["seconds"] if size in (max(units), 0) else 0
        layer[kind] = total
    lines += [
        "",
        f"On paper, {LAYERS} layers of {max(units)} units and these heads: "
        + ", ".join(f"{LAYERS * took / 60:.0f} minutes ({kind})" for kind, took in layer.items())
        + ", reading and writing apart.",
    ]
    return "\n".join(lines)


# -- barrier -----------------------------------------------------------------------------------------------


def read(folder: Path, part: str) -> Tensor:
    """The bytes of all texts."""
    texts = []
    for file in sorted(folder.glob(f"*.{part}.jsonl")):
        texts += [f"{row['p']}\n{row['a']}\n\n" for row in map(json.loads, file.read_text().splitlines())]
    return torch.tensor(list("".join(texts).encode()), dtype=torch.long)


def make(seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
    )


def train(model, data: Tensor, steps: int, seed: int, rate: float = 3e-3) -> None:
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        at = torch.randint(len(data) - 129, (16,), generator=draw)
        batch = torch.stack([data[i : i + 128] for i in at.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 200 == 199:
            print(f"  step {step + 1}: {loss.item():.3f}", file=sys.stderr, flush=True)


@torch.no_grad()
def loss(model, tensors: dict[str, Tensor], data: Tensor) -> float:
    model.load_state_dict(tensors)
    batch = data[: 64 * 128].view(64, 128)
    return model(input_ids=batch, labels=batch).loss.item()


def aligned(tensors: dict[str, Tensor], anchor: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    sides = [ModelTensors.of(name, side, config) for name, side in (("B", tensors), ("A", anchor))]
    model = AlignedModel(*sides, KINDS)
    return {name: model.whole(name) for name in tensors}


def barrier(folder: Path, steps: int) -> str:
    data, held_out = read(folder, "train"), read(folder, "dev")
    held_out = held_out[torch.arange(64 * 128) + len(held_out) // 3]
    state = lambda model: {name: W.clone() for name, W in model.state_dict().items()}  # noqa: E731
    first = make(0)
    start = state(first)
    config = first.config.to_dict()
    train(first, data, steps, seed=0)
    anchor = state(first)

    tuned = make(0)
    tuned.load_state_dict(anchor)
    train(tuned, data, steps // 3, seed=1, rate=1e-3)
    # aligned to random values, a model's units and heads are anywhere
    moved = aligned(state(tuned), state(make(7)), config)

    same_stream = make(1)
    shared = {name: W for name, W in start.items() if "layers" not in name}
    same_stream.load_state_dict(shared, strict=False)
    train(same_stream, data, steps, seed=2)
    apart = make(2)
    train(apart, data, steps, seed=3)

    shares = torch.linspace(0, 1, 11).tolist()
    curves: dict[str, list[list[float]]] = {}
    for name, other in {
        "a fine-tune that was moved": moved,
        "apart, from one embedding": state(same_stream),
        "apart altogether": state(apart),
    }.items():
        curves[name] = [
            [
                loss(first, {key: torch.lerp(W, to[key], t) for key, W in anchor.items()}, held_out)
                for t in shares
            ]
            for to in (other, aligned(other, anchor, config))
        ]
        print(name, curves[name], file=sys.stderr, flush=True)
    draw(shares, curves)
    lines = [
        "| second model | loss of the two | highest between, before | after | barrier before | after |",
        "|---|---|---|---|---|---|",
    ]
    for name, (before, after) in curves.items():
        ends = before[0], before[-1]
        heights = [
            max(y - (1 - t) * ends[0] - t * ends[1] for t, y in zip(shares, curve))
            for curve in (before, after)
        ]
        cells = [name, " and ".join(f"{end:.3f}" for end in ends)]
        cells += [f"{x:.3f}" for x in (max(before[1:-1]), max(after[1:-1]), *heights)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(shares: list[float], curves: dict[str, list[list[float]]]) -> None:
    from matplotlib.figure import Figure

    from mergekit_tspa.insight.pictures import THEMES, WIDTH, Picture, Theme

    def panels(theme: Theme) -> Figure:
        figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
        axes = figure.subplots(1, len(curves), sharey=True)
        for axis, (name, pair) in zip(axes, curves.items()):
            for curve, colour, label, style in zip(
                pair, theme.lines[1::-1], ("before", "aligned"), ("--", "-")
            ):
                axis.plot(shares, curve, style, color=colour, label=label)
            axis.set_title(name)
            axis.patch.set_alpha(0)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("loss on held-out bytes")
        axes[1].set_xlabel("share of the second model")
        legend = axes[0].legend(frameon=False)
        for text in legend.get_texts():
            text.set_color(theme.text)
        return figure

    picture = Picture("barrier", "", "", "", panels)
    for theme in THEMES:
        (ROOT / f"docs/align/barrier{theme.suffix}.png").write_bytes(picture.png(theme))


# -- model -------------------------------------------------------------------------------------------------


@torch.no_grad()
def real_model(path: Path, adapter: Path) -> str:
    from transformers import AutoModelForCausalLM

    base = ModelTensors.of("base", Checkpoint(path))
    names = list(base.shapes)
    W_base = {name: base.part(name) for name in names}
    lora, modules = read_adapter(adapter).fit(base)
    tuned = dict(W_base)
    for name, module in modules.items():
        tuned[name] = (W_base[name].float() + lora.factors(module).dense()).to(W_base[name].dtype)
    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(shape, generator=generator) for name, shape in base.shapes.items()}
    moved = aligned(tuned, noise, base.config)
    model = AlignedModel(ModelTensors.of("moved", moved, base.config), base, KINDS)
    back: dict[str, Tensor] = {}
    took = seconds(lambda: back.update({name: model.whole(name) for name in names}))
    reader = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = torch.arange(1000, 1256)[None]

    def logits(*models: dict[str, Tensor]) -> Tensor:
        """Of the mean of some models."""
        mean = {name: sum(W[name].float() for W in models) / len(models) for name in names}
        reader.load_state_dict(mean, strict=False)  # without a head that is tied
        return reader(tokens).logits

    def error(got: Tensor, want: Tensor) -> str:
        return f"{((got - want).norm() / want.norm()).item():.4f}"

    own, mean = logits(tuned), logits(tuned, W_base)
    lines = [
        f"{path.name} with {adapter.name} merged, {next(iter(W_base.values())).dtype}, all symmetries; "
        f"aligned in {took:.1f} s. {summary(model)}.",
        "",
        "| | of the moved model | once it is aligned |",
        "|---|---|---|",
        f"| relative error of its logits | {error(logits(moved), own)} | {error(logits(back), own)} |",
        f"| of those of its mean with the base | {error(logits(moved, W_base), mean)} "
        f"| {error(logits(back, W_base), mean)} |",
    ]
    return "\n".join(lines)


# -- results -----------------------------------------------------------------------------------------------


def keep(part: str, text: str) -> None:
    """Put a part into the results, in the place of an earlier one."""
    threads = os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())
    options = re.sub(r"--texts \S+", "--texts DIR", " ".join(sys.argv[1:]))
    head = f"`python benchmarks/symmetry.py {options}`, {date.today()}, {platform.machine()}, {threads} CPU threads."
    old = RESULTS.read_text() if RESULTS.exists() else "# Symmetries of whole models\n"
    parts = dict(re.findall(r"## (\w+)\n\n(.*?)(?=\n## |\Z)", old, re.DOTALL))
    parts[part] = f"{head}\n\n{text}\n"
    RESULTS.write_text(
        "# Symmetries of whole models\n"
        + "".join(f"\n## {p}\n\n{t.strip()}\n" for p, t in sorted(parts.items()))
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("cost").add_argument("--units", type=int, nargs="+", default=[3584, 7168, 14336])
    row = parts.add_parser("row")  # of `cost`, in a process of its own
    row.add_argument("units", type=int)
    row.add_argument("related", type=int)
    curves = parts.add_parser("barrier")
    curves.add_argument("--texts", type=Path, required=True)
    curves.add_argument("--steps", type=int, default=600)
    real = parts.add_parser("model")
    real.add_argument("--base", type=Path, default=ROOT / "build/models/SmolLM2-135M-Instruct")
    real.add_argument("--adapter", type=Path, default=ROOT / "examples/adapters/math")
    args = parser.parse_args()
    if args.part == "row":
        found = (
            measure_mlp(args.units, bool(args.related))
            if args.units
            else measure_attention(bool(args.related))
        )
        return print(json.dumps(found))
    text = {
        "cost": lambda: cost(args.units),
        "barrier": lambda: barrier(args.texts, args.steps),
        "model": lambda: real_model(args.base, args.adapter),
    }[args.part]()
    keep(args.part, text)


if __name__ == "__main__":
    main()
