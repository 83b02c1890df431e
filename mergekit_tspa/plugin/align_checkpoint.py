"""Write a whole model aligned to another one as a checkpoint for any other tool."""

import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from mergekit_tspa.adapters import (
    Adapter,
    check_architecture,
    check_reachable,
    locate_adapter,
    read_adapter,
    turn_adapter,
)
from mergekit_tspa.adapters.write import AdapterWriter
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.errors import InputError, reason_of
from mergekit_tspa.merging.servable import task_type_of
from mergekit_tspa.methods.inputs import Progress
from mergekit_tspa.plugin.compat import ModelReference, TensorWriter
from mergekit_tspa.plugin.output import replaced
from mergekit_tspa.symmetry.align import AlignedModel
from mergekit_tspa.symmetry.blocks import Kind

_WEIGHTS = (".safetensors", ".bin", ".index.json", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def open_aligned(
    model: str, anchor: str, kinds: Collection[Kind], device: torch.device | str | None
) -> AlignedModel:
    """A model as it is once aligned; so far headers are read only.

    Args:
        model: a directory or a repository of the hub
        anchor: another one of the same architecture

    Raises:
        InputError: there is no such model, or the two cannot be aligned.
    """
    here, there = (ModelTensors.of(name, Checkpoint(_directory(name))) for name in (model, anchor))
    check_architecture(model, here.config, anchor, there.config)
    return AlignedModel(here, there, kinds, device)


def open_turned(path: str, model: AlignedModel) -> Adapter:
    """An adapter of the model as it is once that model is aligned.

    Raises:
        InputError: it cannot be read, does not fit the model, or is more than updates of single tensors.
    """
    adapter, tensors = read_adapter(locate_adapter(path), path).fit(model.model)
    turned = turn_adapter(adapter, tensors, model)
    others = [name for name, module in turned.modules.items() if name.endswith("]") or module.convolution]
    if others := [*adapter.changes, *others]:
        raise InputError(
            f"{path}: what it does to {others[0]} is no low-rank update of one tensor; merge it into "
            f"{model.name} first, and align that model"
        )
    return turned


@torch.no_grad()
def write_aligned(
    model: AlignedModel, out: Path, progress: Progress, adapters: Sequence[Adapter] = ()
) -> None:
    """Write an aligned model, tensor by tensor; the directory appears when it is whole.

    Configuration and tokenizer are copied from the model, and so is the dtype of each tensor.

    Args:
        adapters: which turn with the model, and go into `adapters/` of its directory

    Raises:
        InputError: `out` is there already, or cannot be written, or two adapters have one name.
    """
    check_out(out)
    names = [Path(adapter.name).name for adapter in adapters]
    if len({*names}) < len(names):
        raise InputError(
            f"{', '.join(names)}: several adapters have one name; align them one after the other"
        )
    source = _directory(model.name)
    with replaced(out) as partial, TensorWriter(str(partial)) as writer:
        for file in source.iterdir():
            if file.is_file() and not file.name.endswith(_WEIGHTS):
                shutil.copy(file, partial / file.name)
        for done, name in enumerate(model.shapes):
            progress("aligning", done / len(model.shapes))
            writer.save_tensor(name, model.whole(name), clone=True)
        for name, adapter in zip(names, adapters):
            dtype = next(iter(adapter.modules.values())).dtype  # type: ignore[attr-defined]  # TurnedModule
            turned = AdapterWriter(partial / "adapters" / name, adapter.modules, dtype)
            for module in adapter.modules:
                turned.add(module, adapter.factors(module))
            turned.finish(str(out), task_type_of(model.config))


def check_out(out: Path) -> None:
    """
    Raises:
        InputError: there is something of that name.
    """
    if os.path.lexists(out):
        raise InputError(f"{out}: is there already; name another directory with --out")


def _directory(name: str) -> Path:
    """
    Raises:
        InputError: there is no model of that name.
    """
    if os.path.isdir(os.path.expanduser(name)):
        return Path(name).expanduser()
    try:
        model = ModelReference.parse(name)
        if model.lora:
            raise InputError(f"{name}: align the model alone, and give its adapter with --adapter")
        check_reachable(model.model.path, model.model.revision)
        return Path(model.local_path())
    except InputError:
        raise
    except Exception as error:  # no name of a repository, or not to be downloaded
        raise InputError(
            f"{name}: neither a directory nor a model of the hub that can be reached ({reason_of(error)})"
        ) from error
