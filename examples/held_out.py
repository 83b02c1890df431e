"""Let each example adapter answer the prompts of examples/held-out: `python examples/held_out.py` writes the answers into the files.

So the texts judge how much a merge talks like each of its adapters.  The answers are drawn at temperature 0.7 from a
fixed seed, at most 80 tokens each.
"""

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "build/models/SmolLM2-135M-Instruct"


@torch.no_grad()
def answers(adapter: Path, prompts: list[str]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(BASE, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).merge_and_unload().eval()
    texts = [f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n" for prompt in prompts]
    ids = tokenizer(texts, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    out = model.generate(
        **ids,
        max_new_tokens=80,
        do_sample=True,
        temperature=0.7,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.eos_token_id,
    )
    return [
        text.strip()
        for text in tokenizer.batch_decode(out[:, ids.input_ids.shape[1] :], skip_special_tokens=True)
    ]


def main() -> None:
    for file in sorted((ROOT / "examples/held-out").glob("*.jsonl")):
        prompts = [json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines()]
        rows = zip(prompts, answers(ROOT / "examples/adapters" / file.stem, prompts))
        lines = [json.dumps({"prompt": p, "completion": a}, ensure_ascii=False) + "\n" for p, a in rows]
        file.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
