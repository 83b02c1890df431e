"""Statistics in a file beside an adapter."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_tspa.adapters import read_adapter
from mergekit_tspa.adapters.on_disk import OnDisk
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.calibration.moments import SketchedInputs, StoredInputs, input_statistics
from mergekit_tspa.calibration.store import (
    calibration_file,
    hash_adapter,
    hash_base,
    load_statistics,
    save_statistics,
)
from mergekit_tspa.errors import InputError
from tests.calibration.conftest import random_texts, singles_of
from tests.conftest import load_model, relative_error, save_llama


@pytest.fixture
def stored(llama, adapters, tmp_path):
    singles = singles_of(llama, adapters)
    statistics = input_statistics(singles, random_texts(singles.names))["three"]
    file = calibration_file(tmp_path, "some/path/three")
    save_statistics(file, statistics, "base", "adapter", k=16)
    return file, statistics


def test_round_trip(stored):
    file, statistics = stored
    assert file.name == "three.calibration.safetensors"
    found = load_statistics(file, "base", "adapter")
    assert list(found) == list(statistics)
    for tensor, before in statistics.items():
        after, sketch = found[tensor], before.low_rank(16)
        assert after.tokens == before.tokens
        assert relative_error(after.dense(), sketch.dense()) < 0.01  # U is stored in bfloat16
        torch.testing.assert_close(after.dense().diagonal(), before.dense().diagonal(), rtol=0.01, atol=1e-6)
    # Tensors that share their inputs do so in the file, too.
    assert len(load_file(file)) == 3 * len({id(s) for s in statistics.values()}) == 24
    assert len({id(s) for s in found.values()}) == 8


def test_directions_stay_in_their_file_which_must_be_the_same(stored):
    file, _ = stored
    found = [*load_statistics(file, "base", "adapter").values()]
    assert all(isinstance(one, StoredInputs) and isinstance(one.U, OnDisk) for one in found)
    assert found[0].low_rank(3).U.shape == (found[0].U.shape[0], 3)
    assert found[0].trace() == pytest.approx(found[0].dense().trace().item(), rel=1e-5)
    file.write_bytes(file.read_bytes() + b"0")
    with pytest.raises(InputError, match="the file has changed since this run began"):
        found[0].dense()


def test_statistics_of_another_base_or_adapter_are_refused(stored):
    file, _ = stored
    with pytest.raises(InputError, match=r"three\.calibration\.safetensors: .* another base,"):
        load_statistics(file, "other", "adapter")
    with pytest.raises(InputError, match=r"three\.calibration\.safetensors: .* another adapter,"):
        load_statistics(file, "base", "other")
    assert load_statistics(file)


def test_files_that_hold_no_sound_statistics(stored, adapters, tmp_path):
    file, _ = stored
    with pytest.raises(InputError, match="no statistics of inputs there"):
        load_statistics(tmp_path / "none.calibration.safetensors")
    with pytest.raises(InputError, match="holds no statistics"):
        load_statistics(adapters[0] / "adapter_model.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged"):
        load_statistics(file)
    size = int.from_bytes(whole[:8], "little")
    metadata = json.loads(whole[8 : 8 + size])["__metadata__"]
    file.write_bytes(whole)
    for part, change in (
        ("0.rest", lambda x: -x - 1),
        ("0.values", lambda x: x * torch.nan),
        ("0.U", lambda x: x[:3]),
    ):
        tensors = load_file(file)
        tensors[part] = change(tensors[part]).contiguous()
        save_file(tensors, tmp_path / "bad", metadata=metadata)
        with pytest.raises(InputError, match="damaged"):
            load_statistics(tmp_path / "bad")


def test_files_hold_no_text(llama, adapters, tmp_path):
    """Two texts with the same tokens in another order give the same names and the same sizes."""
    singles = singles_of(llama, adapters[:1])
    sizes = []
    for seed in (0, 1):
        statistics = input_statistics(singles, random_texts(["one"], seed=seed))["one"]
        save_statistics(tmp_path / f"{seed}", statistics, "base", "adapter", k=4)
        sizes.append({name: tuple(t.shape) for name, t in load_file(tmp_path / f"{seed}").items()})
    assert sizes[0] == sizes[1]
    assert {name.partition(".")[2] for name in sizes[0]} == {"U", "values", "rest"}
    assert all(len(shape) < 2 or shape[1] == 4 for shape in sizes[0].values())


def test_size_of_an_8b_model(tmp_path):
    """32 layers, d_in 4096, query and value adapted, which share an input: below 40 MB."""
    layers, d, k = 4, 4096, 64  # an eighth of the layers
    statistics = {}
    for layer in range(layers):
        inputs = SketchedInputs(torch.zeros(d, k), torch.zeros(k), torch.zeros(d), 1)
        statistics |= {f"model.layers.{layer}.self_attn.{p}_proj.weight": inputs for p in "qv"}
    file = tmp_path / "a.calibration.safetensors"
    save_statistics(file, statistics, "base", "adapter")
    exact = layers * (2 * d * k + 4 * d + 4 * k)
    assert exact <= file.stat().st_size < exact + 4096
    assert file.stat().st_size * 32 / layers < 40e6


def test_hash_of_a_base(llama, tmp_path):
    known = hash_base(Checkpoint(llama))
    assert hash_base(Checkpoint(save_llama(tmp_path / "again"))) == known
    # The same model in another precision, and one that says who saved it, are the same base.
    load_model(llama).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert hash_base(Checkpoint(tmp_path / "bf16")) == known
    for name, key, value in (("theta", "rope_theta", 5.0), ("eps", "rms_norm_eps", 1e-3)):
        shutil.copytree(llama, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | {key: value}))
        assert hash_base(Checkpoint(tmp_path / name)) != known
    tuned = load_model(llama)
    with torch.no_grad():
        tuned.model.norm.weight[3] += 0.1
    tuned.save_pretrained(tmp_path / "tuned")
    assert hash_base(Checkpoint(tmp_path / "tuned")) != known
    assert hash_base(Checkpoint(save_llama(tmp_path / "wide", intermediate_size=97))) != known


def test_hash_of_an_adapter(adapters):
    one, two = (read_adapter(path) for path in adapters[:2])
    assert hash_adapter(one) == hash_adapter(read_adapter(adapters[0], "other name")) != hash_adapter(two)
    module = next(iter(one.modules))
    for change in ({"scale": 3.0}, {"B": one.modules[module].B.read() * 2}, {"magnitude": torch.ones(64)}):
        modules = dict(one.modules) | {module: one.modules[module]._replace(**change)}
        assert hash_adapter(type(one)("one", None, modules)) != hash_adapter(one)
