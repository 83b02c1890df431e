"""Factors stay in their file until they are asked for, and the file must be the one it was."""

import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_tspa import InputError, merge_adapters, read_adapter
from mergekit_tspa.adapters.on_disk import OnDisk, open_tensors, part_of, rows_of, transposed


@pytest.fixture
def file(tmp_path):
    tensors = {
        "half": torch.randn(6, 4).to(torch.bfloat16),
        "single": torch.randn(3, 5),
        "vector": torch.randn(7),
        "numbers": torch.arange(4).view(2, 2),
    }
    save_file(tensors, file := tmp_path / "tensors.safetensors", metadata={"format": "pt"})
    return file


def test_matrices_are_read_when_they_are_asked_for(file):
    want, found = load_file(file), open_tensors(file)
    assert {key for key, tensor in found.items() if isinstance(tensor, OnDisk)} == {"half", "single"}
    for key, tensor in found.items():
        assert tensor.shape == want[key].shape and tensor.dtype == want[key].dtype
        assert torch.equal(tensor.to(torch.float64), want[key].double())
    assert pickle.loads(pickle.dumps(found["half"])).read().equal(want["half"])  # as another machine gets it


def test_what_is_made_of_a_matrix(file):
    want, half = load_file(file)["half"], open_tensors(file)["half"]
    assert transposed(half).shape == (4, 6) and transposed(half).read().equal(want.T)
    assert rows_of(half, slice(2, 5)).shape == (3, 4) and rows_of(half, slice(2, 5)).read().equal(want[2:5])
    doubled = part_of(rows_of(half, slice(4)), torch.neg, (4, 4))
    assert doubled.read().equal(-want[:4]) and doubled.nbytes == 32
    for made, plain in ((transposed(want), want.T), (rows_of(want, slice(2)), want[:2])):
        assert made.equal(plain)


def test_parts_of_one_matrix_read_it_once(file, monkeypatch):
    half, reads = open_tensors(file)["half"], []
    whole = OnDisk._read
    monkeypatch.setattr(OnDisk, "_read", lambda self: reads.append(self.key) or whole(self))
    for i in range(6):
        rows_of(half, slice(i, i + 1)).read()
    assert reads == ["half"]


def test_what_parts_were_made_of_is_let_go(tmp_path, monkeypatch):
    """Experts ask for their parts of `B` and `A` in turn; no more than these two stay in memory."""
    names = [f"{i}.{side}" for i in range(5) for side in "AB"]
    save_file({name: torch.randn(4, 4) for name in names}, file := tmp_path / "packed.safetensors")
    found, reads, whole = open_tensors(file), [], OnDisk._read
    monkeypatch.setattr(OnDisk, "_read", lambda self: reads.append(self.key) or whole(self))
    for i in range(5):
        for row in range(4):
            for side in "AB":
                rows_of(found[f"{i}.{side}"], slice(row, row + 1)).read()
    assert reads == names
    kept = {id(tensor) for factor in found.values() for tensor in factor.last.values()}
    assert len(kept) == 2


@pytest.mark.parametrize("how", ["cut", "written", "replaced", "removed"])
def test_a_file_that_changes_is_named(adapters, tmp_path, how):
    """Also one that is cut, which would end a process that has mapped it."""

    folder = tmp_path / "adapter"
    shutil.copytree(adapters[0], folder)
    adapter, file = read_adapter(folder), folder / "adapter_model.safetensors"
    module = next(iter(adapter.modules))
    adapter.factors(module)
    stat = file.stat()
    if how == "cut":
        os.truncate(file, stat.st_size // 2)
    elif how == "written":
        with file.open("r+b") as opened:
            opened.seek(-2, os.SEEK_END)
            opened.write(b"\0\0")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif how == "replaced":
        shutil.copyfile(file, tmp_path / "copy")
        (tmp_path / "copy").replace(file)
    else:
        file.unlink()
    with pytest.raises(
        InputError, match="changed since" if how != "removed" else "adapter_model.safetensors"
    ):
        adapter.factors(module)


def test_an_adapter_holds_no_factors(adapters):
    adapter = read_adapter(adapters[0])
    assert all(isinstance(factor, OnDisk) for m in adapter.modules.values() for factor in (m.B, m.A))
    assert merge_adapters("core_tsv", [adapters[0]])  # and merges as before
