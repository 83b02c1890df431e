"""The table of kinds: a row is all that a new kind needs, and docs/adapters.md shows the table.

`python -m tests.adapters.test_table_of_kinds` writes the table of the docs anew.
"""

import inspect
import json
import re
import shutil
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from mergekit_tspa import InputError, read_adapter
from mergekit_tspa.adapters import kind_of, kinds
from mergekit_tspa.adapters.kinds import KINDS, MERGE_FIRST, MLX, PLAIN, Kind, kinds_of
from mergekit_tspa.updates import LoraFactors
from tests.conftest import ROOT, relative_error

PAGE = ROOT / "docs/adapters.md"
TABLE = re.compile(r"(<!-- `mergekit_tspa/adapters/kinds.py` -->\n)(.*?)(\n<!-- end -->)", re.DOTALL)


def recognised(rows: list[Kind]) -> str:
    """What says that an adapter is of one of these kinds."""
    values = [value for kind in rows for value in kind.init.replace(".*", "*").split("|") if value]
    by = [f"`{kind.flag}`" for kind in rows if kind.flag]
    if values:
        by.append(f"`init_lora_weights`: {', '.join(f'`{value}`' for value in values)}")
    if any(kind.tensors for kind in rows):
        by.append("names of tensors")
    return ", ".join(by)


def treated(kind: Kind) -> tuple[str, str]:
    """What is done with it from a file, and whether it is merged in a model."""
    in_a_model = ("yes, with a warning" if kind.alters_base else "yes") if kind.in_memory else "no"
    return (kind.update if kind.read else f"refused: {kind.way_out}"), in_a_model


def table() -> str:
    """One line for neighbouring rows that are treated alike."""
    lines = [("kind", "recognised by", "from a file", "in a model"), ("---",) * 4]
    for (done, in_a_model), group in groupby(KINDS, treated):
        rows = list(group)
        lines.append((", ".join(kind.name for kind in rows), recognised(rows), done, in_a_model))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def test_the_docs_show_the_table():
    assert TABLE.search(PAGE.read_text())[2] == table()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows_are_complete(kind):
    assert kind.flag or kind.init or kind.tensors
    assert kind.read != bool(kind.way_out) and kind.read == bool(kind.update)
    assert kind.read or kind.what or kind.init  # an initialisation is named by its value


def test_every_flag_and_value_is_peft_s_own():
    flags = {kind.flag for kind in KINDS if kind.flag and kind != MLX}
    assert flags <= LoraConfig.__dataclass_fields__.keys()
    source = inspect.getsource(inspect.getmodule(LoraConfig))
    for kind in KINDS:
        for value in filter(None, kind.init.removesuffix(".*").split("|")):
            assert f'"{value}' in source or f"'{value}'" in source, value


@pytest.fixture
def adapter(adapters, tmp_path):
    return shutil.copytree(adapters[0], tmp_path / "a")


def with_settings(adapter, **settings):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return adapter


def add(monkeypatch, kind: Kind) -> None:
    monkeypatch.setattr(kinds, "KINDS", (kind, *KINDS))


def test_a_refused_kind_is_one_row(adapter, monkeypatch):
    """By its flag in a file or in memory, and by its tensors."""
    with_settings(adapter, use_newlora=True)
    assert read_adapter(adapter).modules
    row = Kind(
        "NewLoRA",
        flag="use_newlora",
        tensors=r"\.newlora_",
        read=False,
        what="a NewLoRA adapter",
        way_out=MERGE_FIRST,
        in_memory=False,
    )
    add(monkeypatch, row)
    with pytest.raises(InputError, match=f"a NewLoRA adapter is not supported; {MERGE_FIRST}"):
        read_adapter(adapter)
    assert kinds_of({"use_newlora": True}) == [row] and kinds_of({"use_newlora": False}) == []
    with_settings(adapter, use_newlora=None)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.x.newlora_gate": torch.ones(4)}, file)
    with pytest.raises(InputError, match=r"tensor x\.newlora_gate belongs to a NewLoRA adapter"):
        read_adapter(adapter)


def test_an_initialisation_is_one_row(adapter, monkeypatch, caplog):
    """One that leaves the base alone, and one that took a part out of it."""
    with_settings(adapter, init_lora_weights="newinit")
    plain = read_adapter(adapter)
    assert "'newinit', unknown here" in caplog.text and kind_of(adapter) == "LoRA"
    caplog.clear()
    row = Kind("NewInit", init="newinit", update=PLAIN, label="NewInit")
    add(monkeypatch, row)
    assert read_adapter(adapter).modules.keys() == plain.modules.keys()
    assert not caplog.text and kind_of(adapter) == "NewInit"

    half = lambda W, rank, scale: LoraFactors(0.5 * W[:, :rank], W[:rank])  # noqa: E731
    add(monkeypatch, replace(row, base_part=half, alters_base=True))
    for module in read_adapter(adapter).modules.values():
        W = module.A.new_ones(module.shape)
        module.base_part.read = lambda W=W: W
        taken = module.base_part.factors(None)
        assert module.rank == 2 * taken.rank
        got = module.factors(W.dtype, None).dense()
        assert relative_error(got + taken.dense(), module.scale * module.B @ module.A) < 1e-5


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda found: found[1] + table() + found[3], PAGE.read_text()))
