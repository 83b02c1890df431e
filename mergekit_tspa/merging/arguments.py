"""What the Python entries are given, checked before anything is read."""

import os
import reprlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_tspa.adapters import Adapter
from mergekit_tspa.base.geometry import AttentionGeometry
from mergekit_tspa.calibration.readings import SELF, TextSource
from mergekit_tspa.errors import InputError, reason_of

AdapterLike = str | os.PathLike | Mapping[str, tuple[Tensor, Tensor]]
BaseLike = str | os.PathLike | Mapping[str, Tensor]
TextsLike = str | os.PathLike | Sequence[Mapping[str, Any]]


def adapters_of(adapters: Sequence[AdapterLike], weighted: bool) -> list[AdapterLike]:
    """
    Args:
        weighted: whether there are weights, which go by the order of the adapters

    Raises:
        InputError: it is no sequence of adapters, or an empty one.
    """
    if isinstance(adapters, str | os.PathLike | Mapping):
        raise InputError("adapters must be a sequence: put the one adapter in a list")
    if not isinstance(adapters, Iterable):
        raise InputError(f"adapters must be a sequence, not {adapters!r}")
    if weighted and isinstance(adapters, set | frozenset):
        raise InputError("adapters are a set, which has no order for the weights to go by: give a list")
    adapters = list(adapters)
    if not adapters:
        raise InputError("there are no adapters to merge: give at least one")
    for i, adapter in enumerate(adapters):
        if not isinstance(adapter, str | os.PathLike | Mapping) or "\0" in str(adapter):
            raise InputError(
                f"adapter {i} is {reprlib.repr(adapter)}: give a directory, a repository of the hub, or a "
                "mapping {module: (B, A)}"
            )
    return adapters


def numbers_of(weights: Iterable[Any]) -> list[float]:
    """The weights as Python's own numbers; scalars of numpy and torch count as numbers.

    Raises:
        InputError: one of them is no real number, or they have no order.
    """
    unordered = str | bytes | Mapping | set | frozenset
    if not isinstance(weights, Iterable) or isinstance(weights, unordered):
        raise InputError(f"weights must be a sequence with one number per adapter, not {weights!r}")
    given = list(weights)
    plain = [weight.item() if getattr(weight, "shape", None) == () else weight for weight in given]
    if not all(isinstance(weight, int | float) and not isinstance(weight, bool) for weight in plain):
        raise InputError(f"weights must be numbers, not {reprlib.repr(given)}")
    if any(isinstance(weight, int) and abs(weight) > sys.float_info.max for weight in plain):
        raise InputError(f"weights must be numbers that fit a float, not {reprlib.repr(given)}")
    return plain


def check_base(base: Any) -> None:
    """
    Raises:
        InputError: it is neither a directory nor a mapping of tensors.
    """
    if base is None or isinstance(base, str | os.PathLike):
        return
    if not isinstance(base, Mapping):
        raise InputError(f"base must be a directory or a mapping of tensors, not {base!r}")
    for name, tensor in base.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(
                f"base must map names to tensors, and {name!r} has {type(tensor).__name__} there; give the "
                "model's state_dict()"
            )


def check_geometry(geometry: Any) -> None:
    """
    Raises:
        InputError: it says nothing about heads.
    """
    if geometry is not None and not isinstance(geometry, AttentionGeometry):
        raise InputError(f"geometry must be an AttentionGeometry with the head counts, not {geometry!r}")


def usable(device: torch.device | str) -> torch.device:
    """
    Raises:
        InputError: torch knows no such device, or this machine has none.
    """
    try:
        found = torch.empty(0, device=device).device
        torch.zeros(1, device=device).item()  # the device `meta` has no values
        return found
    except (
        Exception
    ) as error:  # an AssertionError without CUDA, a RuntimeError or TypeError for other devices
        raise InputError(
            f"device {str(device)!r} cannot be used here ({reason_of(error)}); the default is the CPU"
        ) from error


def text_sources(
    adapters: Sequence[Adapter],
    examples: TextsLike | Sequence[TextsLike | None] | None,
    calibration: Sequence[str | os.PathLike | None] | None,
) -> dict[Adapter, TextSource]:
    """Where the texts of each adapter come from.

    Raises:
        InputError: not one of them per adapter, or something else than texts.
    """
    if isinstance(examples, str) and examples == SELF:
        examples = [SELF] * len(adapters)
    sources = {adapter: TextSource() for adapter in adapters}
    for name, given in (("examples", examples), ("calibration", calibration)):
        if given is None:
            continue
        if isinstance(given, str | os.PathLike | Mapping) or not isinstance(given, Iterable):
            raise InputError(f"{name} must have one entry per adapter, not a {type(given).__name__}")
        entries = list(given)
        if len(entries) != len(adapters):
            raise InputError(f"{len(adapters)} adapters and {len(entries)} {name}: give one per adapter")
        for adapter, entry in zip(adapters, entries):
            sources[adapter] = sources[adapter]._replace(**{name: _texts(name, entry)})
    return sources


def _texts(name: str, entry: Any) -> Any:
    """
    Raises:
        InputError: this is no file, nor `self`, nor a list of objects; what it is may be a text, and is not
            said.
    """
    if entry is None or entry == SELF:
        return entry
    if isinstance(entry, str | os.PathLike):
        return Path(entry).expanduser()
    rows = name == "examples"
    if rows and isinstance(entry, Sequence):
        return entry
    also = ", a list of objects with text, or self" if rows else ""
    raise InputError(f"{name}: give a file{also} for each adapter, not a {type(entry).__name__}")
