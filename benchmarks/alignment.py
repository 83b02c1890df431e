"""What TSPA's solving costs on the shapes of Llama-3-8B; every comparison is made within one run.

python benchmarks/alignment.py curve   # time over the number of adapters, rank 8 on q and v, paper's steps
python benchmarks/alignment.py large   # rank 32 on q, k, v, o, eight adapters
python benchmarks/alignment.py dense   # one layer against the objective written with dense matrices and autograd
python benchmarks/alignment.py merge   # mergekit-yaml on four layers: tspa against lora_task_arithmetic
(--device cuda for the first two)
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

import geoopt
import torch
import yaml
from memory import measure
from synthetic import LLAMA_3_8B, linear_shapes, write_adapters, write_llama

from mergekit_tspa import AttentionGeometry, merge_adapters
from mergekit_tspa.alignment.attention import align_attention, key_side, pair_problem, query_side, side_grams
from mergekit_tspa.alignment.lora import align_lora

LAYERS = 32
GEOMETRY = AttentionGeometry(LLAMA_3_8B["heads"], LLAMA_3_8B["kv_heads"], LLAMA_3_8B["head_dim"])
SHAPES = {m: s for m, s in linear_shapes(**LLAMA_3_8B).items() if "attn" in m}


class RepeatedLayer(Mapping[str, torch.Tensor]):
    """A model whose layers all hold the same weights, so that 32 of them fit; each read is still worked on."""

    def __init__(self, device: str):
        generator = torch.Generator().manual_seed(0)
        self.weights = {
            m: torch.empty(s, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator).to(device)
            for m, s in SHAPES.items()
        }
        self.names = [f"model.layers.{i}.{m}.weight" for i in range(LAYERS) for m in SHAPES]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.weights[name.split(".", 3)[3].removesuffix(".weight")]

    def __iter__(self):
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def adapters(
    count: int, rank: int, modules: str, device: str
) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Random adapters that share a part, as adapters of one initialisation do."""
    made = []
    for t in range(count):
        adapter = {}
        for layer in range(LAYERS):
            for module, (d_out, d_in) in SHAPES.items():
                if module.split(".")[1][0] in modules:
                    shared, own = (
                        torch.Generator().manual_seed(seed) for seed in (layer, 1000 * (t + 1) + layer)
                    )
                    draw = lambda *s, g: 0.02 * torch.randn(*s, generator=g)  # noqa: E731
                    B = draw(d_out, rank, g=shared) + draw(d_out, rank, g=own)
                    A = draw(rank, d_in, g=shared) + draw(rank, d_in, g=own)
                    adapter[f"model.layers.{layer}.{module}"] = (B.to(device), A.to(device))
        made.append(adapter)
    return made


def solve(base, count: int, rank: int, modules: str, device: str, **parameters):
    """Seconds of the whole call: Grams of the base, both stages, and the sum."""
    given = adapters(count, rank, modules, device)
    start = time.perf_counter()
    merged = merge_adapters("tspa", given, base=base, geometry=GEOMETRY, device=device, **parameters)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, merged


def left(merged) -> str:
    """Objective after each stage over its start."""
    return " ".join(f"{(r.end.sum() / r.start.sum()).item():.4f}" for r in merged.reports)


def curve(device: str) -> None:
    base = RepeatedLayer(device)
    solve(base, 2, 8, "qv", device, attention_steps=1, lora_steps=1)  # warm up
    print(
        "| adapters | seconds | objective left (qk, ov, lora) | with tolerance 3e-4: seconds | objective left |"
    )
    print("|---|---|---|---|---|")
    seconds, early = {}, {}
    for n in (2, 4, 8, 16, 32):
        seconds[n], merged = solve(base, n, 8, "qv", device)
        early[n], stopped = solve(base, n, 8, "qv", device, tolerance=3e-4)
        print(f"| {n} | {seconds[n]:.1f} | {left(merged)} | {early[n]:.1f} | {left(stopped)} |", flush=True)
    print(f"\nfrom 2 to 8 adapters: {seconds[8] / seconds[2]:.2f} times")
    draw_curve(seconds, early, Path(__file__).parent / "results" / "curve.png")


def draw_curve(seconds: dict[int, float], early: dict[int, float], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paper = {2: 638, 4: 1000, 8: 1530}  # Li et al.: whole merges of one A800
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for label, times in (("paper, A800", paper), ("fixed steps", seconds), ("tolerance 3e-4", early)):
        axes.loglog(list(times), list(times.values()), "o-", base=2, label=label)
    axes.set(xlabel="adapters", ylabel="seconds", title="TSPA on Llama-3-8B shapes, rank 8 on q and v")
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(base=10))
    axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


def large(device: str) -> None:
    seconds, merged = solve(RepeatedLayer(device), 8, 32, "qkvo", device)
    print(f"rank 32, q k v o, 8 adapters: {seconds:.0f} s, objective left {left(merged)}")


def dense(_device: str, n: int = 4, rank: int = 8) -> None:
    """Stage 1 on query-key and stage 2 on one matrix, plainly and in Gram form."""
    _dense_attention(n, rank, width=512, steps=100, repeat=1)
    _dense_attention(n, rank, width=4096, steps=2, repeat=50)
    _dense_lora(n, rank, width=1024, steps=2000, repeat=1)
    _dense_lora(n, rank, width=4096, steps=40, repeat=50)


def descend(
    loss: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer, steps: int
) -> tuple[float, float]:
    """Seconds and final value of plain minimisation by autograd."""
    start = time.perf_counter()
    first = loss().item()
    for _ in range(steps):
        optimizer.zero_grad()
        (loss() / first).backward()
        optimizer.step()
    return time.perf_counter() - start, loss().item()


def compare(what: str, plain: float, fast: float, repeat: int, ratio: float) -> None:
    """`repeat`: the plain version took this many times fewer steps than ours and is scaled up."""
    compared = f", final objective {ratio:.4f} of the plain one" if repeat == 1 else ""
    scaled = " (scaled up)" * (repeat > 1)
    print(
        f"{what}: plain {plain * repeat:.1f} s{scaled}, ours {fast:.3f} s, {plain * repeat / fast:.0f} times{compared}"
    )


def _dense_attention(n: int, rank: int, width: int, steps: int, repeat: int) -> None:
    h, g, d = GEOMETRY[:3]
    generator = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=generator)  # noqa: E731
    W, V = 0.02 * draw(h * d, width), 0.02 * draw(g * d, width)
    B, A = 0.02 * draw(n, h * d, rank), 0.02 * draw(n, rank, width)

    R = geoopt.ManifoldParameter(torch.eye(d).repeat(n, g, 1, 1), manifold=geoopt.EuclideanStiefel())
    optimizer = geoopt.optim.RiemannianAdam([R], lr=0.1, amsgrad=True)
    K = V.view(g, 1, d, width)

    def product(query: torch.Tensor) -> torch.Tensor:  # (h d, width) -> every head's W_Q^T W_K
        return (query.view(g, h // g, d, width).mT @ K).flatten(0, 1)

    def loss() -> torch.Tensor:
        heads = B.view(n, g, h // g, d, rank)
        rotated = (R.mT[:, :, None] @ heads).reshape(n, h * d, rank)
        merged = product(W + rotated.sum(0) @ A.sum(0))
        return sum((merged - product(W + B[t] @ A[t])).square().sum() for t in range(n))

    plain, end = descend(loss, optimizer, steps)

    start = time.perf_counter()
    none = torch.zeros(n, g * d, 0), torch.zeros(n, 0, width)
    grams = side_grams(*query_side(None, B, A, h, g)), side_grams(*key_side(V, *none, g))
    problem = pair_problem([grams[0]], [grams[1]], torch.ones(1, n))
    *_, solution = align_attention(problem, steps=100)
    fast = time.perf_counter() - start
    mean = sum(product(W + B[t] @ A[t]) for t in range(n)) / n
    constant = sum((product(W + B[t] @ A[t]) - mean).square().sum() for t in range(n)).item()
    ours = n * solution.end.item() + constant
    compare(f"query-key, width {width}", plain, fast, repeat, ours / end)


def _dense_lora(n: int, rank: int, width: int, steps: int, repeat: int) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=generator)  # noqa: E731
    B, A = 0.1 * draw(n, width, rank), 0.1 * (draw(rank, width) + draw(n, rank, width))
    R = geoopt.ManifoldParameter(torch.eye(rank).repeat(n, 1, 1), manifold=geoopt.EuclideanStiefel())
    log_s = torch.nn.Parameter(torch.zeros(n, 1, 1))
    optimizer = geoopt.optim.RiemannianAdam([R, log_s], lr=0.05, amsgrad=True)

    def loss() -> torch.Tensor:
        merged = (log_s.exp() * B @ R).sum(0) @ ((-log_s).exp() * R.mT @ A).sum(0)
        return sum((merged - B[t] @ A[t]).square().sum() for t in range(n))

    plain, end = descend(loss, optimizer, steps)

    start = time.perf_counter()
    G_B, G_A = (B.mT[:, None] @ B[None])[None], (A[:, None] @ A.mT[None])[None]
    *_, solution = align_lora(G_B, G_A, torch.ones(1, n))
    fast = time.perf_counter() - start
    mean = sum(B[t] @ A[t] for t in range(n)) / n
    ours = n * solution.end.item() + sum((B[t] @ A[t] - mean).square().sum().item() for t in range(n))
    compare(f"LoRA, width {width}", plain, fast, repeat, ours / end)


def merge(_device: str, runs: int = 3) -> None:
    methods = {"lora_task_arithmetic": {}, "tspa": {}, "tspa with tolerance 3e-4": {"tolerance": 3e-4}}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        folder = Path(folder)
        base = write_llama(folder / "base", 4, **LLAMA_3_8B)
        given = list(write_adapters(folder / "adapters", 4, 4, 8, ("q_proj", "v_proj"), **LLAMA_3_8B))
        script = str(Path(sys.executable).parent / "mergekit-yaml")
        seen = {method: [] for method in methods}
        for turn in range(runs + 1):  # in turns, the first one a warm-up
            for method, parameters in methods.items():
                recipe = folder / "recipe.yml"
                models = [{"model": f"{base}+{a}"} for a in given]
                recipe.write_text(
                    yaml.safe_dump(
                        {"merge_method": method.split()[0], "models": models, "parameters": parameters}
                    )
                )
                result = measure(
                    script, str(recipe), str(folder / "out"), "--out-shard-size", "250M", "--quiet"
                )
                if turn:
                    seen[method].append(result)
    wall, peak = ({m: statistics.median(r[i] for r in seen[m]) for m in methods} for i in (0, 1))
    plain = "lora_task_arithmetic"
    print(
        "| method | seconds | against task arithmetic | peak MiB | against task arithmetic |\n|---|---|---|---|---|"
    )
    for m in methods:
        print(
            f"| {m} | {wall[m]:.1f} | {wall[m] / wall[plain]:.2f} | {peak[m]:.0f} | {peak[m] / peak[plain]:.2f} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", choices=("curve", "large", "dense", "merge"))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    where = (
        torch.cuda.get_device_name()
        if args.device.startswith("cuda")
        else f"{torch.get_num_threads()} CPU threads"
    )
    print(f"{date.today()}, {platform.machine()}, {where}; python {' '.join(sys.argv)}\n", flush=True)
    for what in args.what:
        {"curve": curve, "large": large, "dense": dense, "merge": merge}[what](args.device)
