"""An adapter in memory, and how it fits a base model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

import torch
from torch import Tensor

from mergekit_tspa.adapters import experts
from mergekit_tspa.adapters.modules import BasePart, Change, LoraModule
from mergekit_tspa.base.architectures import EMBEDDINGS, HEADS, VOCABULARY, architecture_of
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.errors import InputError
from mergekit_tspa.symmetry.align import AlignedModel
from mergekit_tspa.updates import LoraFactors


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """A LoRA adapter in memory, in the file's precision."""

    name: str
    base: str | None  # base_model_name_or_path, as its author wrote it
    modules: Mapping[str, LoraModule]
    changes: Mapping[str, Change] = field(default_factory=dict)  # of tensors, by name
    aligned: AlignedModel | None = None  # the model that was aligned for it

    @classmethod
    def from_factors(cls, name: str, factors: Mapping[str, tuple[Tensor, Tensor]]) -> "Adapter":
        """An adapter from `{module: (B, A)}` with the scale folded in."""
        for module, pair in factors.items():
            if not isinstance(module, str) or not module:
                raise InputError(f"{name}: {module!r} is no name of a module")
            if not (
                isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(f, Tensor) for f in pair)
            ):
                raise InputError(
                    f"{name}: {module} has {type(pair).__name__} where a pair of tensors (B, A) is expected"
                )
            B, A = pair
            if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0] or not B.numel() or not A.numel():
                raise InputError(
                    f"{name}: factors of {module} have shapes {tuple(B.shape)} and {tuple(A.shape)}; "
                    "expected B (d_out, r) and A (r, d_in), none of them empty"
                )
            if not all(_holds_numbers(factor) for factor in pair):
                raise InputError(
                    f"{name}: a factor of {module} is complex, sparse, of 8-bit floats or on the device "
                    "meta; expected a dense tensor of real values"
                )
            if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
                raise InputError(f"{name}: a factor of {module} contains NaN or Inf")
        return cls(name, None, {module: LoraModule(B, A) for module, (B, A) in factors.items()})

    def __repr__(self) -> str:
        directly = f"{len(self.changes)} tensors trained directly"
        return f"<Adapter {self.name}: {len(self.modules)} modules, {directly}>"

    @property
    def tensors(self) -> dict[str, str]:
        """`{tensor: module that updates it}`, as the adapter names them."""
        return {module if module.endswith("]") else f"{module}.weight": module for module in self.modules}

    def factors(
        self, module: str, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> LoraFactors:
        """The update `B A` of a module, in the base's orientation.

        Raises:
            InputError: it depends on the base's tensor, and no base was fitted.
        """
        found = self.modules[module]
        if found.base_part and found.base_part.read is None:
            raise InputError(
                f"{self.name}: PiSSA and OLoRA put a part of the base into the factors; give the base model "
                "(base=)"
            )
        return found.factors(dtype, device)

    def fit(self, base: ModelTensors) -> tuple["Adapter", dict[str, str]]:
        """Match the adapter to a base model: itself, and `{base tensor: module that updates it}`.

        Its changes take the names of the base's tensors.  PEFT goes by a layer's class and ignores
        `fan_in_fan_out` where the two contradict each other, so the orientation of each module is settled
        here: by the base's architecture, and by the flag only where the base has no configuration.

        Raises:
            InputError: a module has no tensor in the base, or one that has another shape, is quantised, or
                is tied to another.
        """
        modules = experts.settle(self.modules, base, self.name)
        adapter = replace(self, modules=modules, changes=self._tie_changes(base))
        named = adapter.tensors
        if base.tied and (tied := [name for name in named if name.endswith(VOCABULARY)]):
            raise InputError(
                f"{self.name}: it adapts {tied[0]}, but {base.name} ties embedding and head to one tensor; "
                "untie the base first, or train without it"
            )
        tensors = {tensor: named[name] for name, tensor in base.match(named, self.name).items()}
        modules = {module: adapter._fit_module(module, tensor, base) for tensor, module in tensors.items()}
        places = base.match(adapter.changes, self.name)
        changes = {tensor: adapter.changes[name] for name, tensor in places.items()}
        for tensor, change in changes.items():
            self._fit_change(change, tensor, base)
        return replace(adapter, modules=modules, changes=changes), tensors

    def _fit_module(self, module: str, tensor: str, base: ModelTensors) -> LoraModule:
        found, shape = self.modules[module], base.shape(tensor)
        self._check_precision(tensor, base)
        there = (*shape[:1], torch.Size(shape[1:]).numel())
        if conv1d := architecture_of(base.config).conv1d:
            found = found._replace(transposed=found.embedding or tensor.split(".")[-2] in conv1d)
        elif found.transposed and not found.embedding and "[" not in tensor and base.config.get("model_type"):
            # Layers of other architectures are nn.Linear.  One that `ARCHITECTURES` lacks may have Conv1D
            # layers of its own: their shapes say so, if they are not square.
            upright = found._replace(transposed=False)
            found = found if found.shape == there != upright.shape else upright
        if found.shape != there:
            self._refuse_shape(f"update of {module}", found.shape, tensor, base)
        if found.magnitude is not None and len(found.magnitude) != found.B.shape[0]:
            raise InputError(
                f"{self.name}: {module} has {len(found.magnitude)} magnitudes for {found.B.shape[0]} "
                "outputs; save the adapter again"
            )
        if found.base_part:
            found = found._replace(base_part=BasePart(found.base_part.of, lambda: base.part(tensor)))
        return found

    def _fit_change(self, change: Change, tensor: str, base: ModelTensors) -> None:
        self._check_precision(tensor, base)
        shape = tuple(change.value.shape)
        if change.rows is not None:  # the base must have at least the rows that it names
            rows = int(change.rows.max()) + 1
            shape = (max(rows, *base.shape(tensor)[:1]), *shape[1:])
        if shape != base.shape(tensor):
            self._refuse_shape("new value", shape, tensor, base)

    def _check_precision(self, tensor: str, base: ModelTensors) -> None:
        if base.config.get("quantization_config") or tensor in base.quantised:
            raise InputError(
                f"{base.name}: the base model is quantised, and {self.name} changes its {tensor}; merge into "
                "the original full-precision checkpoint"
            )

    def _refuse_shape(self, what: str, shape: tuple[int, ...], tensor: str, base: ModelTensors) -> NoReturn:
        trained_on = f" (the adapter says it was trained on {self.base})" if self.base else ""
        there = base.shape(tensor)
        if tensor.endswith(VOCABULARY) and shape[1:] == there[1:]:
            raise InputError(
                f"{self.name}: its vocabulary has {shape[0]} tokens but {tensor} of {base.name} has "
                f"{there[0]}; resize the base to {shape[0]} tokens first "
                f"(resize_token_embeddings){trained_on}"
            )
        raise InputError(
            f"{self.name}: the {what} has shape {shape} but {tensor} of {base.name} has {there}; "
            f"use the base the adapter was trained on{trained_on}"
        )

    def _tie_changes(self, base: ModelTensors) -> Mapping[str, Change]:
        """The changes, adjusted to a base that ties its head to its embedding.

        The head's own change is left out.  If the base stores the head nevertheless, the embedding's change
        is made there too.

        Raises:
            InputError: embedding and head were trained apart.
        """
        head = next((name for name in self.changes if name.endswith(HEADS)), None)
        embedding = next((name for name in self.changes if name.endswith(EMBEDDINGS)), None)
        if not base.tied or not (head or embedding):
            return self.changes
        trained = self.changes.get(embedding or "")
        # PEFT ties rows of tokens by itself.  It ties whole embeddings only with ensure_weight_tying, and
        # then it saves both.
        if trained is None or not (trained.equals(self.changes[head]) if head else trained.rows is not None):
            raise InputError(
                f"{self.name}: it trained {head or embedding} apart from the tensor that {base.name} ties it "
                "to; untie the base first, or train with ensure_weight_tying"
            )
        changes = {name: change for name, change in self.changes.items() if name != head}
        return changes | {tensor: trained for tensor in base.shapes if tensor.endswith(HEADS)}


def _holds_numbers(factor: Tensor) -> bool:
    """Whether these are plain real numbers."""
    small = factor.is_floating_point() and factor.dtype.itemsize == 1
    return factor.layout == torch.strided and not (factor.is_complex() or factor.is_meta or small)
