"""Malformed files: each is read, or refused in one sentence that names it, in little memory and without side effects.

`pytest tests/adapters/test_fuzz.py -m slow` tries thousands of cases.
"""

import io
import json
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from mergekit_tspa import InputError, read_adapter
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.tensors import ModelTensors

MODULE = "model.layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
TENSORS = {
    f"base_model.model.{MODULE}.lora_A.weight": torch.ones(2, 6),
    f"base_model.model.{MODULE}.lora_B.weight": torch.ones(8, 2),
}
BASE = {
    f"{MODULE}.weight": torch.ones(8, 6),
    "model.norm.weight": torch.ones(8),
    "model.scalar.weight": torch.ones(()),
}
MEMORY = 2**26  # beyond what the process had

cases = pytest.mark.parametrize("examples", [12, pytest.param(300, marks=pytest.mark.slow)])


def survives(read, *names: str | Path) -> None:
    """`read` succeeds, or raises an InputError of one line that names the file; in little memory."""
    survives.cases += 1
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    resident = lambda field: int(re.search(rf"{field}:\s+(\d+)", status.read_text())[1]) * 1024  # noqa: E731
    if clear.exists():
        clear.write_text("5")  # resets the peak
    before = resident("VmRSS") if clear.exists() else 0
    try:
        read()
    except InputError as error:
        assert "\n" not in error.message and len(error.message) < 1500
        assert any(str(name) in error.message for name in names), error.message
    if clear.exists():
        assert resident("VmHWM") - before < MEMORY


survives.cases = 0


def check(examples: int, strategy, body) -> None:
    quick = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[*HealthCheck],
    )
    quick(given(strategy)(body))()


@pytest.fixture
def adapter(tmp_path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(CONFIG))
    (path / "adapter_model.safetensors").write_bytes(save(TENSORS))
    read_and_fit(path)
    return path


def read_and_fit(path: Path) -> None:
    adapter, tensors = read_adapter(path).fit(
        ModelTensors.of("the base", BASE, {"tie_word_embeddings": False})
    )
    for module in tensors.values():
        adapter.factors(module)


# Values of every JSON type, and those that a number's reader trips over.
NUMBERS = st.sampled_from([0, 1, 2, 6, 8, 48, 64, 2**20, 2**31, 2**40, 2**62, 2**64 - 1, -1])
ODD = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.sampled_from([10**400, 0.5, 1e-300, 1e300, "", "x", "2", "../x", "(", "a{99999999999}"]),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-3, 9), max_size=4),
    st.lists(st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(-3, 9), max_size=3),
    st.dictionaries(
        st.sampled_from(["q_proj", "(", ".*", "scale", "nblocks", "target_modules_bd_a"]),
        st.one_of(st.integers(), st.floats(), st.lists(st.just("q_proj"))),
    ),
)
NESTED = st.recursive(
    ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
)
KEYS = st.sampled_from(
    """peft_type r lora_alpha rank_pattern alpha_pattern target_modules use_rslora use_dora use_bdlora use_qalora
    fan_in_fan_out init_lora_weights modules_to_save target_parameters trainable_token_indices lora_B_layout
    base_model_name_or_path kasa_config arrow_config layer_replication alora_invocation_tokens bias
    lora_parameters model fine_tune_type""".split()
)
ODD_NAMES = st.one_of(
    st.sampled_from(
        """../../etc/passwd /etc/passwd . .. .lora_A. a.lora_A.weight [0] x[y].lora_A.weight x[0].weight
        base_model.model. lora_A.weight model.norm.lora_A.weight model.scalar.lora_B.weight model.norm.weight
        base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta model.norm.lora_magnitude_vector
        base_model.model.x.experts.lora_A.weight base_model.model.x.lora_embedding_A model.scalar.weight""".split()
    ),
    st.sampled_from(
        ["", "\0", "a\0.weight", "a" * 10**6, "a." * 10**5 + "lora_A.weight", "\ud800", "a\nb.weight"]
    ),
    st.text(max_size=20),
)


@cases
def test_configuration(examples, adapter):
    def body(changes):
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(CONFIG | changes))
        survives(lambda: read_and_fit(adapter), adapter)

    check(examples, st.dictionaries(KEYS, NESTED, min_size=1, max_size=3), body)


@cases
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_bytes(examples, name, adapter):
    """Cut, overwritten, random, or nested deeper than a parser's stack."""
    file = adapter / name
    whole = file.read_bytes()
    strategy = st.one_of(
        st.binary(max_size=300),
        st.integers(0, len(whole)).map(lambda end: whole[:end]),
        st.tuples(st.integers(0, len(whole) - 1), st.binary(min_size=1, max_size=9)).map(
            lambda edit: whole[: edit[0]] + edit[1] + whole[edit[0] + len(edit[1]) :]
        ),
        st.builds(
            lambda deep, times: (
                (len(deep) * times).to_bytes(8, "little") * name.endswith("tensors") + deep * times
            ),
            st.sampled_from([b"[", b'{"a":', b"9", b'{"__metadata__":{"a":']),
            st.sampled_from([10**3, 10**5]),
        ),
    )

    def body(content):
        file.write_bytes(content)
        survives(lambda: read_and_fit(adapter), adapter)

    check(examples, strategy, body)


ENTRIES = st.lists(
    st.tuples(
        st.sampled_from([*TENSORS]) | ODD_NAMES,
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(
                    "F32 F16 BF16 F64 F8_E4M3 F8_E5M2 F8_E8M0 F4 F6_E2M3 C64 I8 I64 U16 U64 BOOL X".split()
                ),
                "shape": st.lists(NUMBERS, max_size=4) | st.just([2, 6]) | st.just([8, 2]),
                "data_offsets": st.tuples(NUMBERS, NUMBERS) | st.just((0, 48)) | st.just((48, 112)),
            }
        )
        | NESTED,
    ),
    max_size=4,
)


def safetensors(entries: list, length: int | None, body: int) -> bytes:
    """A file whose header has these entries, duplicates included, and says that it has `length` bytes."""
    header = "{" + ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in entries) + "}"
    header = header.encode()
    return (len(header) if length is None else length % 2**64).to_bytes(8, "little") + header + bytes(body)


@cases
@pytest.mark.parametrize("of_base", [False, True])
def test_headers(examples, of_base, adapter, tmp_path):
    def body(parts):
        if of_base:
            (tmp_path / "model.safetensors").write_bytes(safetensors(*parts))
            survives(lambda: Checkpoint(tmp_path).shapes(), tmp_path)
        else:
            (adapter / "adapter_model.safetensors").write_bytes(safetensors(*parts))
            survives(lambda: read_and_fit(adapter), adapter)

    lengths = st.none() | NUMBERS | st.sampled_from([99 * 10**6, 10**8 + 1])
    check(examples, st.tuples(ENTRIES, lengths, st.sampled_from([0, 1, 48, 112, 160, 4096])), body)


@cases
def test_names(examples, adapter):
    def body(renamed):
        assume(all("\ud800" not in name for name in renamed))
        tensors = dict(zip(renamed, [*TENSORS.values(), torch.ones(8)]))
        (adapter / "adapter_model.safetensors").write_bytes(save(tensors))
        survives(lambda: read_and_fit(adapter), adapter)

    check(
        examples, st.lists(st.sampled_from([*TENSORS]) | ODD_NAMES, min_size=1, max_size=3, unique=True), body
    )


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickles(marker: Path) -> st.SearchStrategy:
    """State dictionaries with objects that are no tensors, or views of more than they store, or code."""
    whole = torch.ones(4)
    odd = st.sampled_from(
        [
            Call(open, str(marker), "w"),
            Call(eval, f"open({str(marker)!r}, 'w')"),
            Call(exec, f"open({str(marker)!r}, 'w')"),
            Call(torch.ones, 2**20, 2**20),
            Call(bytearray, 2**40),
            whole.as_strided((2**20, 2**20), (0, 0)),
            whole.expand(2**40, 4),
            torch.empty(2**20, 2**20, device="meta"),
            torch.ones(3, 3).to_sparse(),
            torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (2**31, 2**31)),
            torch.quantize_per_tensor(whole, 1.0, 0, torch.quint8),
            torch.ones(6, 2).mT,
            torch.nn.Parameter(torch.ones(2, 6)),
            torch.ones(2, dtype=torch.complex64),
            *([], {}, None, 1, "x", b"x", (1, 2)),
        ]
    )
    return (
        st.dictionaries(st.sampled_from([*TENSORS, 1, None, "state_dict"]) | ODD_NAMES, odd, max_size=3) | odd
    )


@cases
@pytest.mark.parametrize("of_base", [False, True])
def test_pickles(examples, of_base, adapter, tmp_path):
    marker = tmp_path / "touched"
    (adapter / "adapter_model.safetensors").unlink()

    def body(parts):
        content, zipped, protocol, cut = parts
        file = tmp_path / "pytorch_model.bin" if of_base else adapter / "adapter_model.bin"
        try:
            torch.save(content, file, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
        except (RuntimeError, UnicodeEncodeError):
            assume(False)
        if cut is not None:
            file.write_bytes(file.read_bytes()[: -1 - cut])
        if of_base:
            survives(lambda: Checkpoint(tmp_path).shapes(), tmp_path)
        else:
            survives(lambda: read_and_fit(adapter), adapter)
        assert not marker.exists()

    check(
        examples, st.tuples(pickles(marker), st.booleans(), st.just(2), st.none() | st.integers(0, 200)), body
    )


def test_lying_pickles(adapter):
    """A compressed archive, storages that say they are larger, and a plain pickle."""
    file = adapter / "adapter_model.bin"
    (adapter / "adapter_model.safetensors").unlink()
    name = next(iter(TENSORS))
    torch.save({name: torch.zeros(2**22)}, file)
    bomb = io.BytesIO()
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    file.write_bytes(bomb.getvalue())
    with pytest.raises(InputError, match="unpacks to more"):
        read_adapter(adapter)
    for zipped in (True, False):
        torch.save({name: torch.zeros(3, 14)}, file, _use_new_zipfile_serialization=zipped)
        small, large = b"K*", b"J\x00\x00\x00\x40"  # pickle's 42, and 2^30
        if zipped:
            changed = io.BytesIO()
            with zipfile.ZipFile(file) as source, zipfile.ZipFile(changed, "w") as target:
                for entry in source.infolist():
                    target.writestr(entry.filename, source.read(entry).replace(small, large))
            file.write_bytes(changed.getvalue())
        else:
            file.write_bytes(file.read_bytes().replace(small, large))
        survives(lambda: read_and_fit(adapter), adapter)
    file.write_bytes(pickle.dumps({name: Call(open, str(adapter / "touched"), "w")}))
    survives(lambda: read_and_fit(adapter), adapter)
    assert not (adapter / "touched").exists()


@cases
def test_indices(examples, tmp_path):
    """Of a sharded base; a file outside the directory is never opened."""
    base, outside = tmp_path / "base", tmp_path / "outside.safetensors"
    base.mkdir()
    (base / "one.safetensors").write_bytes(save(BASE))
    outside.write_bytes(save({"secret.weight": torch.ones(2)}))
    files = st.sampled_from(
        [
            "one.safetensors",
            "../outside.safetensors",
            str(outside),
            "x/../../outside.safetensors",
            "\0",
            "",
            "no.bin",
        ]
    )
    names = st.sampled_from([*BASE, "secret.weight"]) | ODD_NAMES

    def body(index):
        (base / "model.safetensors.index.json").write_text(json.dumps(index))

        def read():
            checkpoint = Checkpoint(base)
            assert "secret.weight" not in checkpoint.shapes()
            return [checkpoint[name] for name in checkpoint]

        survives(read, base)

    maps = st.dictionaries(names, files | NESTED, max_size=3) | NESTED
    check(examples, st.fixed_dictionaries({"weight_map": maps}) | NESTED, body)
