"""A base model as adapters see it: shapes, values when asked for, and the two names a tensor can have."""

import re
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Any, TypeAlias

from torch import Tensor

from mergekit_tspa.base.architectures import part_of
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.names import TensorNames
from mergekit_tspa.errors import InputError

Index: TypeAlias = tuple[int | slice, ...]  # which part of a tensor; (): all of it


class ModelTensors:
    """The tensors of a base model.

    A checkpoint can differ from the model at run time, whose names PEFT and mergekit use.  Tensors are
    renamed when a model is loaded, and the experts of a layer, which have tensors of their own on disk,
    become one tensor `(experts, d_out, d_in)`.  Transformers' conversion tables of the model's class and
    type say how.

    One expert of a tensor that is fused on disk is called `name[expert]`.
    """

    def __init__(
        self,
        name: str,
        shapes: Mapping[str, tuple[int, ...]],
        config: Mapping[str, Any] | None = None,
        read: Callable[[str], Tensor] | None = None,
        quantised: Collection[str] = (),
    ):
        self.name, self.shapes, self.config, self.read = name, shapes, config or {}, read
        self.quantised = quantised  # tensors that hold integers or 8-bit floats

    @classmethod
    def of(
        cls, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
    ) -> "ModelTensors":
        """A checkpoint, or a mapping of tensors."""
        if isinstance(tensors, Checkpoint):
            config = config or tensors.config()
            return cls(name, tensors.shapes(), config, tensors.__getitem__, tensors.quantised())
        quantised = [key for key, tensor in tensors.items() if tensor.dtype.itemsize == 1]
        return cls(
            name, {key: tuple(t.shape) for key, t in tensors.items()}, config, tensors.__getitem__, quantised
        )

    @property
    def tied(self) -> bool:
        """Whether embedding and head share one tensor."""
        text = part_of(self.config)
        return bool(text.get("tie_word_embeddings", self.config.get("tie_word_embeddings")))

    def match(self, wanted: Collection[str], adapter: str) -> dict[str, str]:
        """Map tensor names of an adapter to those of the checkpoint.

        Raises:
            InputError: a name matches no tensor, or two names match the same one.
        """
        known = {name: self.find(name) for name in wanted}
        found = {name: tensor for name, tensor in known.items() if tensor is not None}
        missing = [name for name in known if name not in found]
        if missing:
            listed = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            raise InputError(
                f"{adapter}: {len(missing)} of {len(known)} adapted tensors match no tensor of {self.name}: "
                f"{listed} (nearest name there: {self._names.nearest(missing[0])}); was the adapter trained "
                "on another base model, or does it have a bias that the base does not have, or a head (save "
                "the base with that one)?"
            )
        owner: dict[str, str] = {}
        for name, tensor in found.items():
            if tensor in owner:
                raise InputError(
                    f"{adapter}: {owner[tensor]} and {name} both match {tensor} of {self.name}; "
                    "re-save the adapter with one name per module"
                )
            owner[tensor] = name
        return found

    def find(self, name: str) -> str | None:
        """The checkpoint's tensor of this name on disk or at run time; None when none or several fit."""
        whole, *expert = name.partition("[")
        tensor = self._names.find(whole)
        if tensor is None:
            tensor = next((t for t, index in self.find_parts(whole).items() if index == ()), None)
        return tensor and tensor + "".join(expert)

    def has(self, name: str) -> bool:
        """Whether exactly this is the name of a tensor, on disk or at run time."""
        return name in self.shapes or name in self._run_time

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of a tensor, or of one expert of a fused one."""
        whole, bracket, _ = tensor.partition("[")
        return tuple(self.shapes[whole][1:] if bracket else self.shapes[whole])

    def part(self, tensor: str) -> Tensor:
        """The values of a tensor, or of one expert of a fused one."""
        assert self.read is not None
        whole, bracket, expert = tensor.partition("[")
        return self.read(whole)[int(expert[:-1])] if bracket else self.read(whole)

    def find_parts(self, name: str) -> dict[str, Index]:
        """The checkpoint's tensors that make up a tensor at run time, and which part of it each one is."""
        tensor = self._run_time_names.find(name)
        return self._run_time[tensor] if tensor else {}

    def own_name(self, tensor: str) -> str:
        """The checkpoint's name of a tensor that is called by its name at run time; others as they are."""
        if tensor in self.shapes:
            return tensor
        whole = [name for name, index in self.find_parts(tensor).items() if index == ()]
        return whole[0] if len(whole) == 1 else tensor

    def places(self, tensor: str) -> dict[str, Index]:
        """Names of tensors, on disk and at run time, that hold a tensor or expert, and at which index."""
        whole, index = self.place(tensor)
        if index:
            return dict.fromkeys(self.places(whole), index)
        name, part = self._at_run_time(tensor)
        return {tensor: ()} | {name: part}

    def place(self, tensor: str) -> tuple[str, Index]:
        """The tensor on disk that holds a tensor or expert, and at which index."""
        whole, bracket, expert = tensor.partition("[")
        return whole, (int(expert[:-1]),) if bracket else ()

    @cached_property
    def _names(self) -> TensorNames:
        return TensorNames(self.shapes)

    @cached_property
    def _run_time_names(self) -> TensorNames:
        return TensorNames(self._run_time)

    @cached_property
    def _run_time(self) -> dict[str, dict[str, Index]]:
        """`{tensor at run time: {tensor: its part}}` of the tensors whose two names differ."""
        parts: dict[str, dict[str, Index]] = {}
        for tensor in self.shapes:
            name, index = self._at_run_time(tensor)
            if name != tensor:
                parts.setdefault(name, {})[tensor] = index
        return parts

    @cached_property
    def _conversions(self) -> list:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        # Some belong to a class, such as that of the head of GPTNeoXForCausalLM, others to a type of model.
        kinds = (*(self.config.get("architectures") or ()), self.config.get("model_type"))
        return [conversion for kind in kinds for conversion in get_checkpoint_conversion_mapping(kind) or ()]

    def _at_run_time(self, tensor: str) -> tuple[str, Index]:
        """The tensor's name at run time, or that of the fused tensor it is a part of, and which part."""
        name = tensor
        for conversion in self._conversions:
            renamed, pattern = conversion.rename_source_key(name)
            if pattern is None:
                continue
            operations = [type(operation).__name__ for operation in getattr(conversion, "operations", ())]
            if operations in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
                found = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
                assert found is not None  # as `rename_source_key` found this pattern
                rows, position = self.shapes[tensor][0], conversion.source_patterns.index(pattern)
                return renamed, (int(found[1]), slice(position * rows, (position + 1) * rows))
            if not operations:
                name = renamed
        return name, ()
