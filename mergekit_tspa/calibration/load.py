"""A base model and its tokenizer from disk, streamed block by block where the model is larger than memory."""

from collections.abc import Mapping
from pathlib import Path

import torch

from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.calibration.examples import Tokenizer
from mergekit_tspa.calibration.singles import Model
from mergekit_tspa.errors import InputError


def load_model(
    path: Path,
    dtype: torch.dtype = torch.float32,
    memory: int | None = None,
    device: torch.device | str = "cpu",
) -> Model:
    """A causal language model of transformers, without gradients.

    A model that is larger than `memory` stays on disk in part: accelerate reads the tensors of a layer from
    the checkpoint when the layer is called and lets go of them again, so that every pass reads all of them
    once.

    Args:
        path: a directory
        dtype: of the model in memory
        memory: for its tensors, in bytes; None is as much as they need
        device: where it computes

    Raises:
        InputError: this is no causal language model that transformers can load.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shapes = Checkpoint(path).shapes().values()
    size = sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize
    options: dict[str, object] = {}
    if memory is not None and size > memory:
        options = {"device_map": "auto", "max_memory": _limits(memory, torch.device(device))}
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # callers have one of their own
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises many unrelated types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not to be loaded as a causal language model ({reason})") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    loaded: Model = model.requires_grad_(False)
    loaded.eval()
    return loaded if options else loaded.to(device)


def load_tokenizer(path: Path) -> Tokenizer:
    """
    Raises:
        InputError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{path}: has no tokenizer, which examples need; save the base's there") from error


def _limits(memory: int, device: torch.device) -> Mapping[str | int, int]:
    """How much each device may hold, as accelerate wants it; the rest stays on disk."""
    if device.type == "cpu":
        return {"cpu": memory}
    return {device.index or 0: memory, "cpu": 0}
