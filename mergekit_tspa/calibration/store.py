"""Statistics of an adapter's inputs in a file beside it: of what base and adapter they are, and no text."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_tspa.adapters import Adapter
from mergekit_tspa.adapters.on_disk import Factor, in_memory, open_tensors
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.files import read_json, readable, replaced
from mergekit_tspa.calibration.moments import RANK, InputStatistics, SketchedInputs, StoredInputs
from mergekit_tspa.errors import InputError

FORMAT = "mergekit_tspa calibration 1"
_SMALL = 16384  # numbers; tensors up to this size, norms for instance, tell apart bases of the same shapes
# What a configuration says of the program that wrote it, or of running the model, and not of the model.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


def calibration_file(folder: Path, adapter: str) -> Path:
    """Where the statistics of an adapter lie in a folder, by the last part of the adapter's name."""
    return folder / f"{Path(adapter).name}.calibration.safetensors"


def hash_base(base: Checkpoint) -> str:
    """SHA-256 of the configuration, of all tensors' names and shapes, and of the values of the small ones.

    Large tensors are not read, so this takes no time.  A copy in another precision or in other shards is the
    same base; a fine-tuned one has other norms and is not.
    """
    config = read_json(base.directory / "config.json")
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    found = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for name, shape in sorted(base.shapes().items()):
        found.update(json.dumps([name, shape]).encode())
        if 0 < torch.Size(shape).numel() <= _SMALL:
            _add(found, base[name].to(torch.bfloat16))
    return found.hexdigest()


def hash_adapter(adapter: Adapter) -> str:
    """SHA-256 of all that an adapter changes, as it was read from its files and not yet fitted to a base."""
    found = hashlib.sha256()
    for name, module in sorted(adapter.modules.items()):
        found.update(json.dumps([name, module.scale, module.magnitude is not None]).encode())
        for tensor in (module.B, module.A, module.magnitude):
            if tensor is not None:
                _add(found, in_memory(tensor))
    for name, change in sorted(adapter.changes.items()):
        found.update(json.dumps([name, change.added, change.rows is not None]).encode())
        for tensor in (change.value, change.rows):
            if tensor is not None:
                _add(found, tensor)
    return found.hexdigest()


def save_statistics(
    file: Path, statistics: Mapping[str, InputStatistics], base: str, adapter: str, k: int = RANK
) -> None:
    """Write `C ~ U diag(l) U^T + diag(rest)` of every input, those of tensors with the same input once.

    `U` is rounded to bfloat16, and `rest` takes up what this changes of the diagonal.

    Args:
        file: to write
        statistics: by tensor of the base
        base: `hash_base` of the base
        adapter: `hash_adapter` of the adapter
        k: at most so many columns
    """
    numbers: dict[int, int] = {}  # by identity of the statistics
    inputs: list[InputStatistics] = []
    for found in statistics.values():
        if id(found) not in numbers:
            numbers[id(found)] = len(inputs)
            inputs.append(found)
    tensors: dict[str, Tensor] = {}
    for number, found in enumerate(inputs):
        tensors |= {f"{number}.{part}": tensor for part, tensor in _rounded(found.low_rank(k)).items()}
    content = {
        "format": FORMAT,
        "base": base,
        "adapter": adapter,
        "tokens": [found.tokens for found in inputs],
        "inputs": {tensor: numbers[id(found)] for tensor, found in statistics.items()},
    }
    with replaced(file) as partial:
        save_file(tensors, partial, metadata={"calibration": json.dumps(content)})


def load_statistics(
    file: Path, base: str | None = None, adapter: str | None = None
) -> dict[str, InputStatistics]:
    """Statistics by tensor of the base; tensors with the same input have the same object.

    They are looked through once.  Their directions stay in the file, as those of many adapters are large.

    Args:
        file: that `save_statistics` wrote
        base: `hash_base` that they must be of; None takes any
        adapter: `hash_adapter` that they must be of; None takes any

    Raises:
        InputError: the file is missing, damaged or something else, or of another base or adapter.
    """
    if not file.is_file():
        raise InputError(f"{file}: there are no statistics of inputs there")
    with readable(file), safe_open(file, framework="pt") as opened:
        content = json.loads((opened.metadata() or {}).get("calibration", "{}"))
    if content.get("format") != FORMAT:
        raise InputError(
            f"{file}: holds no statistics of inputs that this version reads ({FORMAT!r}); make them again"
        )
    for what, wanted in (("base", base), ("adapter", adapter)):
        if wanted is not None and content.get(what) != wanted:
            raise InputError(
                f"{file}: these statistics are of another {what}, or of an earlier state of it; make them "
                "again"
            )
    with readable(file):
        tensors = open_tensors(file)
        inputs = [_checked(tensors, number, tokens, file) for number, tokens in enumerate(content["tokens"])]
        return {tensor: inputs[number] for tensor, number in content["inputs"].items()}


def _rounded(inputs: SketchedInputs) -> dict[str, Tensor]:
    U = inputs.U.to(torch.bfloat16)
    kept = inputs.U.square() @ inputs.values + inputs.rest
    rest = (kept - U.float().square() @ inputs.values).clamp(min=0)
    return {"U": U.contiguous(), "values": inputs.values.contiguous(), "rest": rest.contiguous()}


def _checked(tensors: Mapping[str, Factor], number: int, tokens: Any, file: Path) -> StoredInputs:
    """
    Raises:
        InputError: shapes or values are not those of statistics.
    """
    U = tensors[f"{number}.U"]
    values, rest = (in_memory(tensors[f"{number}.{part}"]).float() for part in ("values", "rest"))
    sound = U.ndim == 2 and values.shape == U.shape[1:] and rest.shape == U.shape[:1]
    finite = all(bool(torch.isfinite(part).all()) for part in (in_memory(U), values, rest))
    if not sound or not finite or (values < 0).any() or (rest < 0).any() or not isinstance(tokens, int):
        raise InputError(f"{file}: damaged; make the statistics again")
    return StoredInputs(U, values, rest, tokens)


def _add(found: Any, tensor: Tensor) -> None:
    """Add a tensor's shape, precision and bytes to a hash."""
    tensor = tensor.detach().cpu().contiguous()
    found.update(json.dumps([tuple(tensor.shape), str(tensor.dtype)]).encode())
    # Viewed as bytes, because numpy knows no bfloat16.
    found.update(tensor.reshape(-1).view(torch.uint8).numpy())
