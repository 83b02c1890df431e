"""The stock command on a real accelerator, against the same merge on the CPU; skipped where there is none."""

import pytest
import torch

from tests.conftest import merged_tensors, recipe
from tests.plugin.test_merge import check

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

METHODS = {
    "lora_task_arithmetic": {},
    "tspa": {"lora_steps": 30, "attention_steps": 10},
    "knots_ties": {"scope": "model"},
    "core_tsv": {},
    "ctm_tsv": {"rank": 2},
    "svd_cur": {},
}
OPTIONS = [["--cuda"], ["--cuda", "--low-cpu-memory", "--read-to-gpu"], ["--gpu-rich"], ["--multi-gpu"]]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
@pytest.mark.parametrize("method", METHODS)
def test_as_on_the_cpu(method, options, llama, adapters, tmp_path):
    """Random rules are left out: a GPU draws other numbers."""
    config = recipe(method, llama, adapters, [1.0, 0.5, 0.8], parameters=METHODS[method])
    check(merged_tensors(config, tmp_path / "gpu", *options), merged_tensors(config, tmp_path / "cpu"), 1e-3)
