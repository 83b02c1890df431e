"""The Python entry: what it answers, what it accepts, and the adapter that it saves."""

import copy
import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergekit_tspa import InputError, MergedAdapters, merge_adapters, read_adapter
from tests.conftest import base_tensors, peft_merged, relative_error, save_adapter

B = torch.ones(2, 1)


def factors(rank=2):
    torch.manual_seed(rank)
    return {"x.h.0.q": (torch.randn(6, rank), torch.randn(rank, 5))}


# -- what is printed ------------------------------------------------------------------------------------------


def test_reports_and_updates_print_short(llama, adapters):
    merged = merge_adapters("tspa_lora", adapters, lora_steps=5, rank=3)
    assert len(merged.reports) == 2 and "LoRA alignment" in repr(merged.reports)
    for shown in (merged, merged.reports, read_adapter(adapters[0])):
        assert len(repr(shown)) < 1000 and "tensor(" not in repr(shown)
    assert repr(merged).startswith(f"<MergedAdapters of {len(merged)} modules: ")


# -- what is refused, and what is accepted --------------------------------------------------------------------

REFUSED = {
    "no adapters": (lambda: merge_adapters("core_tsv", []), "no adapters to merge: give at least one"),
    "a number of adapters": (lambda: merge_adapters("core_tsv", 3), "adapters must be a sequence, not 3"),
    "an integer": (lambda: merge_adapters("core_tsv", [factors(), 5]), "adapter 1 is 5: give a directory"),
    "no pair": (lambda: merge_adapters("core_tsv", [{"x": 1}]), "x has int where a pair of tensors"),
    "arrays": (
        lambda: merge_adapters("core_tsv", [{"x": (np.ones((2, 1)), np.ones((1, 2)))}]),
        "where a pair of tensors",
    ),
    "unknown device": (
        lambda: merge_adapters("core_tsv", [factors()], device="foo"),
        "device 'foo' cannot be used here",
    ),
    "a device that is a list": (
        lambda: merge_adapters("core_tsv", [factors()], device=[1]),
        "cannot be used here",
    ),
    "weights": (lambda: merge_adapters("core_tsv", [factors()], 0.5), "weights must be a sequence"),
    "truth values": (lambda: merge_adapters("core_tsv", [factors()], [True]), "weights must be numbers"),
    "vectors": (lambda: merge_adapters("core_tsv", [factors()], [torch.ones(1)]), "weights must be numbers"),
    "weights without order": (lambda: merge_adapters("core_tsv", [factors()], {1.0}), "must be a sequence"),
    "weights of bytes": (lambda: merge_adapters("core_tsv", [factors()], b"a"), "weights must be a sequence"),
    "a huge weight": (lambda: merge_adapters("core_tsv", [factors()], [10**400]), "that fit a float"),
    "weight=": (lambda: merge_adapters("core_tsv", [factors()], weight=2), "weight: give weights="),
    "adapters without order": (lambda: merge_adapters("core_tsv", {"a", "b"}, [1, 2]), "which has no order"),
    "two lambdas": (
        lambda: merge_adapters("core_tsv", [factors()], lambda_=1, **{"lambda": 2}),
        "lambda and lambda_ are the same parameter",
    ),
    "rank": (
        lambda: merge_adapters("core_tsv", [factors()], rank=True),
        "parameter rank: True: true and yes",
    ),
    "lambda": (lambda: merge_adapters("core_tsv", [factors()], lambda_=True), "parameter lambda: True"),
    "seed": (lambda: merge_adapters("lora_dare_ties", [factors()], seed=True), "parameter seed: True"),
    "a base": (lambda: merge_adapters("core_tsv", [factors()], base=7), "base must be a directory"),
    "a base of numbers": (
        lambda: merge_adapters("core_tsv", [factors()], base={"x": 3}),
        "'x' has int there",
    ),
    "a geometry": (
        lambda: merge_adapters("core_tsv", [factors()], geometry=3),
        "must be an AttentionGeometry",
    ),
    "progress": (
        lambda: merge_adapters("core_tsv", [factors()], progress=None),
        "progress must be a function",
    ),
    "the device meta": (
        lambda: merge_adapters("core_tsv", [factors()], device="meta"),
        "cannot be used here",
    ),
    "a device without name": (lambda: merge_adapters("core_tsv", [factors()], device=""), "cannot be used"),
    "a NUL": (lambda: merge_adapters("core_tsv", ["a\0b"]), "adapter 0 is 'a\\x00b': give a directory"),
    "a long name": (lambda: merge_adapters("core_tsv", ["a" * 5000]), "there is no such adapter directory"),
    "a base of a long name": (
        lambda: merge_adapters("core_tsv", [factors()], base="a" * 5000),
        "no model.safe",
    ),
    "no name of a module": (lambda: merge_adapters("core_tsv", [{3: (B, B.T)}]), "3 is no name of a module"),
    "an empty factor": (
        lambda: merge_adapters("core_tsv", [{"x": (B[:, :0], B.T[:0])}]),
        "none of them empty",
    ),
    "complex factors": (
        lambda: merge_adapters("core_tsv", [{"x": (B + 0j, B.T)}]),
        "a factor of x is complex",
    ),
    "sparse factors": (lambda: merge_adapters("core_tsv", [{"x": (B, B.T.to_sparse())}]), "sparse, of 8-bit"),
    "8-bit factors": (lambda: merge_adapters("core_tsv", [{"x": (B.to(torch.float8_e5m2), B.T)}]), "8-bit"),
    "an adapter without name": (lambda: read_adapter(""), "an adapter must be a path, not ''"),
    "an adapter that is none": (lambda: read_adapter(None), "an adapter must be a path, not None"),
    "an adapter of a long name": (lambda: read_adapter("a" * 5000), "there is no adapter directory"),
    "a method": (lambda: merge_adapters(["core_tsv"], [factors()]), "there is no method"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(case):
    call, message = REFUSED[case]
    with pytest.raises(InputError, match=re.escape(message)):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(InputError, match="device 'cuda' cannot be used here"):
        merge_adapters("core_tsv", [factors()], device="cuda")


@pytest.mark.parametrize(
    "weights",
    [
        [np.float32(0.5), np.int64(2)],
        np.array([0.5, 2.0]),
        [torch.tensor(0.5), torch.tensor(2)],
        torch.tensor([0.5, 2.0]),
        (weight for weight in (0.5, 2)),
    ],
)
def test_scalars_of_numpy_and_torch_are_weights(weights):
    given = [factors(2), factors(3)]
    got = merge_adapters("lora_task_arithmetic", given, weights)
    want = merge_adapters("lora_task_arithmetic", given, [0.5, 2.0])
    assert torch.equal(got["x.h.0.q"].dense(), want["x.h.0.q"].dense())


# -- the adapter it saves -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, parameters",
    [("core_tsv", {}), ("lora_ties", {"rank": 6}), ("lora_ties", {"rank": 64}), ("tspa_lora", {})],
)
def test_a_saved_adapter_equals_the_merge_in_peft(method, parameters, llama, adapters, tmp_path):
    merged = merge_adapters(method, adapters, [1.0, 0.5, 0.8], base=llama, **parameters)
    merged.save_adapter(tmp_path / "new/out")
    config = json.loads((tmp_path / "new/out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(llama) and config["task_type"] == "CAUSAL_LM"
    got, before = peft_merged(llama, tmp_path / "new/out"), base_tensors(llama)
    for name, W in before.items():
        update = merged.get(name.removesuffix(".weight"))
        assert relative_error(got[name], W if update is None else update.apply_to(W)) < 1e-5


def test_a_saved_adapter_of_gpt2(gpt2, tmp_path):
    """Whose tensors are stored transposed."""
    paths = [
        save_adapter(
            gpt2, tmp_path / str(i), seed=i, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
        )
        for i in range(2)
    ]
    merged = merge_adapters("core_tsv", paths, base=gpt2)
    merged.save_adapter(tmp_path / "out")
    got, before = peft_merged(gpt2, tmp_path / "out"), base_tensors(gpt2)
    for name, update in merged.items():
        assert relative_error(got[f"{name}.weight"], update.apply_to(before[f"{name}.weight"])) < 1e-5


def test_base_and_dtype_of_a_saved_adapter(llama, adapters, tmp_path):
    def saved(merged, **options):
        merged.save_adapter(tmp_path / "out", **options)
        file = tmp_path / "out/adapter_config.json"
        dtypes = {tensor.dtype for tensor in load_file(tmp_path / "out/adapter_model.safetensors").values()}
        return json.loads(file.read_text())["base_model_name_or_path"], dtypes

    assert saved(merge_adapters("core_tsv", adapters)) == (str(llama), {torch.float32})  # as all of them say
    half = [{name: tuple(f.bfloat16() for f in pair) for name, pair in factors(r).items()} for r in (2, 3)]
    merged = merge_adapters("core_tsv", half)
    assert isinstance(merged, MergedAdapters)
    assert saved(merged, base="user/base") == ("user/base", {torch.bfloat16})
    assert saved(merged, base=llama) == (str(llama), {torch.bfloat16})
    assert saved(merged, base="user/base", dtype=torch.float16) == ("user/base", {torch.float16})
    with pytest.raises(InputError, match="give base="):
        merged.save_adapter(tmp_path / "out")
    with pytest.raises(InputError, match="dtype must be a floating-point dtype"):
        merged.save_adapter(tmp_path / "out", base="user/base", dtype="bf16")
    for copied in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        assert torch.equal(copied["x.h.0.q"].dense(), merged["x.h.0.q"].dense())
        with pytest.raises(InputError, match="save the adapter before copying"):
            copied.save_adapter(tmp_path / "out", base="user/base")


def test_what_cannot_be_saved_as_an_adapter(llama, adapters, tmp_path):
    dora = save_adapter(llama, tmp_path / "dora", use_dora=True)
    trained = save_adapter(llama, tmp_path / "trained", modules_to_save=["input_layernorm"])
    expert = {"x.h.0.experts.w[0]": (torch.ones(4, 1), torch.ones(1, 4))}
    image = {"x.h.0.patch": (torch.randn(4, 1), torch.randn(1, 12))}
    convolution = {"x.h.0.patch.weight": torch.randn(4, 3, 2, 2)}
    for merged, message in (
        (merge_adapters("core_tsv", [dora], base=llama), "is a DoRA"),
        (merge_adapters("core_tsv", [trained]), "trained it directly"),
        (merge_adapters("lora_ties", adapters), "gives a dense update; set `rank`"),
        (merge_adapters("core_tsv", [expert]), "it is a fused expert"),
        (merge_adapters("core_tsv", [image], base=convolution), "it is a convolution"),
        (merge_adapters("core_tsv", adapters, [0, 0, 0]), "changes no weight"),
    ):
        with pytest.raises(InputError, match=message):
            merged.save_adapter(tmp_path / "out", base="user/base")
    assert not (tmp_path / "out").exists()

    merged = merge_adapters("core_tsv", adapters)
    for path in ("", None, "a\0b"):
        with pytest.raises(InputError, match="the adapter must be a path"):
            merged.save_adapter(path)
    with pytest.raises(InputError, match="base must be a path, not 3"):
        merged.save_adapter(tmp_path / "out", base=3)
    with pytest.raises(InputError, match="File name too long"):
        merged.save_adapter(tmp_path / ("a" * 300))
    with pytest.raises(InputError, match="16 bits or more"):
        merged.save_adapter(tmp_path / "out", dtype=torch.float8_e4m3fn)
    emptied = merge_adapters("core_tsv", adapters)
    emptied.clear()
    with pytest.raises(InputError, match="no update left"):
        emptied.save_adapter(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    own = shutil.copytree(adapters[0], tmp_path / "own")
    with pytest.raises(InputError, match="one of the merged adapters"):
        merge_adapters("core_tsv", [own]).save_adapter(own)
    with pytest.raises(InputError, match="holds a model"):
        merged.save_adapter(llama)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="it is a file"):
        merged.save_adapter(tmp_path / "file")
