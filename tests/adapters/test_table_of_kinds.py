"""The table of kinds: a row is all that a new kind needs, and docs/adapters.md shows the table.

`python -m tests.adapters.test_table_of_kinds` writes the table of the docs anew.
"""

import inspect
import json
import re
import shutil
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, MissConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from mergekit_tspa import InputError, read_adapter
from mergekit_tspa.adapters import kind_of, kinds
from mergekit_tspa.adapters.kinds import KINDS, MERGE_FIRST, MLX, PLAIN, TO_LORA, Kind, kinds_of
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.updates import LoraFactors
from tests.conftest import ROOT, base_tensors, load_model, relative_error

PAGE = ROOT / "docs/adapters.md"
TABLE = re.compile(r"(<!-- `mergekit_tspa/adapters/kinds.py` -->\n)(.*?)(\n<!-- end -->)", re.DOTALL)


def recognised(rows: list[Kind]) -> str:
    """What says that an adapter is of one of these kinds."""
    values = [value for kind in rows for value in kind.init.replace(".*", "*").split("|") if value]
    by = [f"`{kind.flag}`" for kind in rows if kind.flag]
    if values:
        by.append(f"`init_lora_weights`: {', '.join(f'`{value}`' for value in values)}")
    if types := [name for kind in rows for name in kind.peft_type.split("|") if name]:
        by.append(f"`peft_type`: {', '.join(f'`{name}`' for name in types)}")
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
    assert kind.flag or kind.init or kind.tensors or kind.peft_type
    assert kind.read != bool(kind.way_out) and kind.read == bool(kind.update)
    assert kind.read or kind.what or kind.init  # an initialisation is named by its value


def test_every_flag_and_value_is_peft_s_own():
    flags = {kind.flag for kind in KINDS if kind.flag and kind != MLX}
    assert flags <= LoraConfig.__dataclass_fields__.keys()
    source = inspect.getsource(inspect.getmodule(LoraConfig))
    for kind in KINDS:
        for value in filter(None, kind.init.removesuffix(".*").split("|")):
            assert f'"{value}' in source or f"'{value}'" in source, value


def test_conversion_is_named_for_the_types_that_peft_converts():
    """Those whose layers say so, as far as PEFT has them."""
    instance = SimpleNamespace(get_base_layer=lambda: torch.nn.Linear(2, 2))
    converted = set()
    for peft_type, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        if peft_type != PeftType.LORA and find_spec(layers := tuner.__module__.replace(".model", ".layer")):
            classes = [value for value in vars(import_module(layers)).values() if isinstance(value, type)]
            if any(
                issubclass(layer, BaseTunerLayer) and layer.supports_lora_conversion(instance)
                for layer in classes
            ):
                converted.add(peft_type.value)
    assert {
        name for kind in KINDS if kind.way_out == TO_LORA for name in kind.peft_type.split("|")
    } == converted


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig, MissConfig])
def test_what_peft_converts_can_be_read(config, llama, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = get_peft_model(load_model(llama), config(r=2, target_modules=["q_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(
        InputError, match=r"not 'LORA'.*convert it to LoRA with PEFT's save_as_lora, or merge"
    ):
        read_adapter(tmp_path / "other")
    peft.save_as_lora(tmp_path / "converted", model, rank=64)
    fitted, tensors = read_adapter(tmp_path / "converted").fit(ModelTensors.of("base", base_tensors(llama)))
    merged = model.merge_and_unload().state_dict()
    for tensor, module in tensors.items():
        W = base_tensors(llama)[tensor]
        assert relative_error(W + fitted.factors(module).dense(), merged[tensor]) < 1e-4
    monkeypatch.delattr(peft, "save_as_lora")
    with pytest.raises(InputError, match=f"as factors; {MERGE_FIRST}"):
        read_adapter(tmp_path / "other")


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
        B, A = module.B.read(), module.A.read()
        W = A.new_ones(module.shape)
        module.base_part.read = lambda W=W: W
        taken = module.base_part.factors(None)
        assert module.rank == 2 * taken.rank
        got = module.factors(W.dtype, None).dense()
        assert relative_error(got + taken.dense(), module.scale * B @ A) < 1e-5


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda found: found[1] + table() + found[3], PAGE.read_text()))
