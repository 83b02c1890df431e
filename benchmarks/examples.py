"""What methods with examples keep of the single adapters' gains, beside methods without, and what else they change.

    python benchmarks/examples.py --base MODEL --data DIR --adapters SET [SET ...] [-n 24] [--only NAME ...]

Each SET is a directory with one adapter per task, DIR has `TASK.train.jsonl` and `TASK.dev.jsonl` with a prompt `p` and
an answer `a` a line, and `general.dev.jsonl`.  Train texts are shown to the methods; the dev texts score them, at most
192 tokens each.  Retained is `(loss of the base - loss of the merge) / (loss of the base - loss of the single adapter)`,
the mean over the tasks, with a bootstrap interval over texts.  Losses on texts that no adapter of a set was trained on
say what a merge does to the rest.  Results are kept in --results as they come; an interrupted run goes on where it was,
and prints the table at the end.
"""

import argparse
import contextlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from mergekit_tspa import merge_adapters, read_adapter
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.calibration.batches import Batch, make_batches
from mergekit_tspa.calibration.examples import Example
from mergekit_tspa.calibration.load import load_model, load_tokenizer
from mergekit_tspa.calibration.score import answer_logits
from mergekit_tspa.calibration.singles import Singles
from mergekit_tspa.scoring.losses import TextLoss, mean_loss, retained

LENGTH = 192
CASES: dict[
    str, tuple[str, int | str, dict[str, Any]]
] = {  # label: method, texts of each adapter, parameters
    "sum, weight 0.4": ("lora_task_arithmetic", 0, {"lambda": 0.4}),
    "core_tsv": ("core_tsv", 0, {}),
    "core_tsv, lambda 2, pico, svc": ("core_tsv", 0, {"lambda": 2.0, "pico": True, "svc": True}),
    "core_iso, lambda 3, pico": ("core_iso", 0, {"lambda": 3.0, "pico": True}),
    "actmat, ridge 0.1": ("actmat", 0, {"ridge": 0.1}),
    "actmat, ridge 1": ("actmat", 0, {"ridge": 1.0}),
    "actmat, ridge 3": ("actmat", 0, {"ridge": 3.0}),
    "actmat, ridge 10, lambda 1.5": ("actmat", 0, {"ridge": 10.0, "lambda": 1.5}),
    "swudi_a": ("swudi_a", 0, {}),
    "dc_merge": ("dc_merge", 0, {}),
    "ace": ("ace", 0, {}),
    "optmerge": ("optmerge", 0, {}),
    "regmean, self": ("regmean", "self", {}),
    "regmean, 8 texts": ("regmean", 8, {}),
    "regmean, 32 texts": ("regmean", 32, {}),
    "regmean, 32 prompts": ("regmean", "32 prompts", {}),
    "regmean_plus, 32 texts": ("regmean_plus", 32, {}),
    "fisher, 8 texts": ("fisher", 8, {}),
    "distill, 32 texts": ("distill", 32, {}),
}
Losses = dict[str, list[list[float]]]  # by task: of each text the sum over its tokens and their number


def rows_of(data: Path, task: str, split: str, n: int) -> list[dict]:
    return [json.loads(line) for line in (data / f"{task}.{split}.jsonl").read_text().splitlines()][:n]


def examples_of(data: Path, task: str, texts: int | str) -> Any:
    """What a method is given of a task."""
    if texts == "self":
        return texts
    count, *prompts = str(texts).split()
    rows = rows_of(data, task, "train", int(count))
    return [{"prompt": row["p"]} | ({} if prompts else {"completion": row["a"]}) for row in rows]


@lru_cache
def model_of(base: Path, device: str) -> Any:
    """The base in float32, which all sets of adapters share."""
    return load_model(base, device=device)


class Scorer:
    """The base with a set of adapters, and the dev texts."""

    def __init__(self, base: Path, data: Path, adapters: list[Path], n: int, device: str = "cpu"):
        tokenizer = load_tokenizer(base)
        self.adapters = adapters
        tensors = ModelTensors.of(str(base), Checkpoint(base))
        self.singles = Singles(
            model_of(base, device), tensors, [read_adapter(path, path.name) for path in adapters]
        )
        tasks = [path.name for path in adapters]
        others = [name for name in ("general", "tool") if name not in tasks]
        self.own = {task: self._encode(tokenizer, rows_of(data, task, "dev", n)) for task in tasks}
        self.other = {task: self._encode(tokenizer, rows_of(data, task, "dev", n)) for task in others}

    def _encode(self, tokenizer: Any, rows: list[dict]) -> list[Example]:
        """As the trainer of the adapters wrote them."""
        found = []
        for row in rows:
            prompt = f"<|im_start|>user\n{row['p']}<|im_end|>\n<|im_start|>assistant\n"
            p = tokenizer(prompt, add_special_tokens=False)["input_ids"][:LENGTH]
            a = tokenizer(row["a"] + "<|im_end|>", add_special_tokens=False)["input_ids"][: LENGTH - len(p)]
            found.append(Example(tuple(p), tuple(a)))
        return [example for example in found if example.answer_tokens]

    def base(self) -> Losses:
        return self._losses(self.own | self.other, lambda batch: contextlib.nullcontext())

    def single(self) -> Losses:
        return self._losses(self.own, lambda batch: self.singles.alone(batch.parts))

    def merged(self, updates: Mapping[str, Any]) -> Losses:
        """Of a merge beside the base; a dense update of bench size is its product with the identity."""
        named = {f"{module}.weight": update for module, update in updates.items()}
        return self._losses(self.own | self.other, lambda batch: self.singles.merged(named))

    @torch.no_grad()
    def _losses(
        self, texts: Mapping[str, list[Example]], reading: Callable[[Batch], AbstractContextManager[None]]
    ) -> Losses:
        found: Losses = {task: [] for task in texts}
        for batch in make_batches(texts, 1536):
            with reading(batch):
                logits = answer_logits(self.singles, batch)
            tokens = [example.tokens[example.start :] for example in batch.examples]
            ids = torch.tensor([token for own in tokens for token in own], device=logits.device)
            losses = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
            split = losses.split([len(own) for own in tokens])
            for task, part in batch.parts:
                found[task] += [[float(own.sum()), len(own)] for own in split[part]]
        return found


def text_losses(losses: Losses) -> dict[str, list[TextLoss]]:
    return {task: [TextLoss(*text) for text in own] for task, own in losses.items()}


def table(results: Mapping[str, Any], n: int) -> Iterator[str]:
    yield "| set | method | retained | 95 % | rank | merge, s | general: base, merge | tool: base, merge |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, own in results.items():
        base, single = text_losses(own["base"]), text_losses(own["single"])
        for label, found in own["merges"].items():
            merged = text_losses(found["losses"])
            kept = retained(base, single, merged).mean
            other = [
                f"{mean_loss(base[task]):.3f}, {mean_loss(merged[task]):.3f}" if task not in single else "-"
                for task in ("general", "tool")
            ]
            yield (
                f"| {name} | {label} | {kept.value:.3f} | {kept.low:.3f} to {kept.high:.3f} "
                f"| {found['rank']} | {found['seconds']:.0f} | {' | '.join(other)} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, nargs="+", required=True)
    parser.add_argument("-n", type=int, default=24)
    parser.add_argument("--device", default="cpu", help="that merges and reads")
    parser.add_argument("--only", nargs="*", help="labels")
    parser.add_argument("--results", type=Path, default=Path("build/examples.json"))
    args = parser.parse_args()
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    for folder in args.adapters:
        adapters = sorted(path for path in folder.iterdir() if (path / "adapter_config.json").exists())
        scorer: Scorer | None = None
        own = results.setdefault(folder.name, {"merges": {}})
        for label, (method, texts, parameters) in CASES.items():
            if label in own["merges"] or (args.only and label not in args.only):
                continue
            scorer = scorer or Scorer(args.base, args.data, adapters, args.n, args.device)
            if "base" not in own:
                own["base"], own["single"] = scorer.base(), scorer.single()
            examples = [examples_of(args.data, path.name, texts) for path in adapters] if texts else None
            start = time.perf_counter()
            updates = merge_adapters(
                method, adapters, base=args.base, device=args.device, examples=examples, **parameters
            )
            seconds = time.perf_counter() - start
            if method == "fisher":
                updates = {module: update.truncated(update.rank) for module, update in updates.items()}
            own["merges"][label] = {
                "losses": scorer.merged(updates),
                "rank": max(update.rank for update in updates.values()),
                "seconds": seconds,
            }
            args.results.parent.mkdir(parents=True, exist_ok=True)
            args.results.write_text(json.dumps(results))
    print(
        f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, {args.n} dev texts a task.\n"
    )
    print("\n".join(table(results, args.n)))


if __name__ == "__main__":
    main()
