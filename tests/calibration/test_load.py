"""Bases from disk, also streamed."""

import pytest
import torch

from mergekit_tspa.adapters import read_adapter
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.calibration.distill import distill
from mergekit_tspa.calibration.load import load_model, load_tokenizer
from mergekit_tspa.calibration.moments import input_statistics, merge_in_order
from mergekit_tspa.calibration.score import score, single_answers
from mergekit_tspa.calibration.singles import Singles
from mergekit_tspa.errors import InputError
from tests.calibration.conftest import random_texts, tiny_tokenizer
from tests.calibration.test_moments import compare, solver
from tests.conftest import relative_error, save_adapter


def singles_in(llama, adapters, memory) -> Singles:
    model = load_model(llama, memory=memory)
    tensors = ModelTensors.of(str(llama), Checkpoint(llama))
    return Singles(model, tensors, [read_adapter(path, path.name) for path in adapters])


def test_streamed_base_gives_the_same(llama, adapters, tmp_path):
    paths = [*adapters, save_adapter(llama, tmp_path / "dora", use_dora=True)]
    size = sum(p.numel() for p in load_model(llama).parameters()) * 4
    whole, streamed = (singles_in(llama, paths, memory) for memory in (None, size // 2))
    assert any(parameter.is_meta for parameter in streamed.model.parameters())
    assert not any(parameter.is_meta for parameter in whole.model.parameters())
    texts = random_texts(whole.names)
    a, b = (input_statistics(singles, texts) for singles in (whole, streamed))
    for name in whole.names:
        compare(b[name], {tensor: s.dense() for tensor, s in a[name].items()})
    a, b = (merge_in_order(singles, texts, solver(singles)) for singles in (whole, streamed))
    assert all(relative_error(b[tensor].dense(), f.dense()) < 1e-4 for tensor, f in a.items())
    scores = [score(singles, a, single_answers(singles, texts)) for singles in (whole, streamed)]
    assert all(scores[1][name] == pytest.approx(own, rel=1e-4) for name, own in scores[0].items())
    with pytest.raises(InputError, match="not streamed from disk"):
        distill(streamed, a, {})


def test_a_model_that_fits_is_loaded_whole(llama):
    model = load_model(llama, dtype=torch.bfloat16, memory=10**9)
    assert not hasattr(model, "hf_device_map")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_what_cannot_be_loaded(llama, tmp_path):
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="has no tokenizer"):
        load_tokenizer(llama)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).chat_template
