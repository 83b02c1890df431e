"""What it costs to read texts: `regmean` beside the passes alone, a streamed base, and files of statistics.

    python benchmarks/reading.py passes --base MODEL --adapters DIR [DIR ...] --texts FILE   # eight adapters, one process
    python benchmarks/reading.py streamed                                       # four layers of Llama-3-8B's shapes
    python benchmarks/reading.py file                                           # statistics of a q,v adapter of 8B

`passes` times, in turn, reading the texts of all adapters by the base alone and the whole of `regmean` with `lambda: 1`, statistics and
solution included; without a search, whose passes are its own.  `streamed` reports the peak of the process above what is resident before
the base is touched.  No model is downloaded: the base of `streamed` has random values.
"""

import argparse
import platform
import resource
import tempfile
import time
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import torch

from mergekit_tspa import merge_adapters
from mergekit_tspa.adapters import read_adapter
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.calibration.batches import make_batches
from mergekit_tspa.calibration.examples import read_examples
from mergekit_tspa.calibration.load import load_model, load_tokenizer
from mergekit_tspa.calibration.moments import SketchedInputs
from mergekit_tspa.calibration.singles import BATCH_TOKENS, Singles
from mergekit_tspa.calibration.store import save_statistics

HIDDEN, MLP, LAYERS = 4096, 14336, 32


def passes(base: Path, adapters: list[Path], file: Path, runs: int = 3) -> None:
    model, tokenizer = load_model(base), load_tokenizer(base)
    tensors = ModelTensors.of(str(base), Checkpoint(base))
    singles = Singles(model, tensors, [read_adapter(path) for path in adapters])
    texts = {name: list(read_examples(file, tokenizer).examples) for name in singles.names}
    alone, whole = [], []
    for _ in range(runs):
        start = time.perf_counter()
        for batch in make_batches(texts, BATCH_TOKENS):
            singles.read(batch)
        alone.append(time.perf_counter() - start)
        start = time.perf_counter()
        merge_adapters(
            "regmean",
            adapters,
            base=dict(model.state_dict()),
            model=model,
            tokenizer=tokenizer,
            examples=[file] * len(adapters),
            lambda_=1.0,
        )
        whole.append(time.perf_counter() - start)
    tokens = sum(len(example.tokens) for own in texts.values() for example in own)
    ratio = sorted(b / a for a, b in zip(alone, whole))[runs // 2]
    print(f"{len(adapters)} adapters, {tokens} tokens: passes alone {sorted(alone)[runs // 2]:.1f} s,")
    print(f"regmean {sorted(whole)[runs // 2]:.1f} s, {ratio:.2f} times (medians of {runs}, in turn)")


def streamed(layers: int = 4, memory: float = 1.0) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        config = LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=MLP,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=2048,
        )
        with torch.device("meta"):
            empty = LlamaForCausalLM(config)
        model = empty.to(torch.bfloat16).to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.normal_(std=0.02)
        model.save_pretrained(base, max_shard_size="512MB")
        words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(base)
        size = sum(parameter.numel() for parameter in model.parameters())
        largest = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
        del model, empty
        print(
            f"base of {4 * size / 2**30:.2f} GiB in float32, a block {4 * largest / 2**30:.2f} GiB, memory {memory} GiB:"
        )
        # A process of its own, whose peak is not that of making the base.
        with get_context("spawn").Pool(1) as pool:
            seconds, peak = pool.apply(merge_streamed, (base, layers, memory))
        print(f"{seconds:.0f} s, {peak / 2**20:.2f} GiB above what was resident before")


def merge_streamed(base: Path, layers: int, memory: float) -> tuple[float, int]:
    """Seconds, and KiB of the peak above the imports and the adapters."""
    factors = [
        {
            f"model.layers.{i}.self_attn.{name}": (torch.randn(d, 16) * 0.01, torch.randn(16, HIDDEN) * 0.01)
            for i in range(layers)
            for name, d in (("q_proj", HIDDEN), ("v_proj", 1024))
        }
        for _ in range(2)
    ]
    texts = [{"text": " ".join(["a"] * 64)}] * 8
    options = {"lambda_": 1.0, "memory": memory, "batch_tokens": 1024}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    merge_adapters("regmean", factors, base=base, examples=[texts, texts], **options)
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def file() -> None:
    inputs = [
        SketchedInputs(torch.randn(HIDDEN, 64), torch.rand(64), torch.rand(HIDDEN), 1000)
        for _ in range(LAYERS)
    ]
    statistics = {
        f"model.layers.{i}.self_attn.{name}.weight": own
        for i, own in enumerate(inputs)
        for name in ("q_proj", "v_proj")
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.calibration.safetensors")
        save_statistics(path, statistics, "base", "adapter")
        print(f"statistics of a q,v adapter of Llama-3-8B's shapes: {path.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("passes", "streamed", "file"))
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapters", type=Path, nargs="+")
    parser.add_argument("--texts", type=Path)
    args = parser.parse_args()
    print(f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads")
    if args.what == "passes":
        found = [path for folder in args.adapters for path in sorted(folder.iterdir()) if path.is_dir()]
        passes(args.base, found, args.texts)
    else:
        {"streamed": streamed, "file": file}[args.what]()


if __name__ == "__main__":
    main()
