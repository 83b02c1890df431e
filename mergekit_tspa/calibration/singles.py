"""A model with several single adapters side by side: rows of one batch, each with its own adapter."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mergekit_tspa.adapters import Adapter, ExtractedModule
from mergekit_tspa.base.names import TensorNames
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.calibration.batches import Batch, Texts, make_batches
from mergekit_tspa.calibration.layers import (
    EVERYTHING,
    Layer,
    Parts,
    Progress,
    Update,
    beside,
    find_layers,
    frozen,
    replaced_values,
)
from mergekit_tspa.errors import InputError
from mergekit_tspa.updates import LoraFactors

BATCH_TOKENS = 4096
Model: TypeAlias = Any  # a PreTrainedModel that predicts the next token


class Singles:
    """A base model in memory, and adapters of it.

    One pass serves texts of all adapters: the base's tensors are read once, and a layer adds to each row the
    update of the row's own adapter.  Two kinds of adapters need passes of their own: those that also trained
    tensors directly, whose values are put into the model while their pass lasts, and those of layers that a
    router sends tokens to, which see no rows.

    Args:
        model: of transformers, in any precision, on any device, also streamed from disk
        base: the same model's checkpoint, whose names of tensors are used throughout
        adapters: as read, with different names

    Raises:
        InputError: two names are equal, an adapter does not fit the base, or it changes what is no linear
            layer.
    """

    def __init__(self, model: Model, base: ModelTensors, adapters: Sequence[Adapter]):
        self.model, self.base = model, base
        names = [adapter.name for adapter in adapters]
        if len(set(names)) < len(names):
            raise InputError(f"adapters must have different names, not {', '.join(names)}")
        fitted = {adapter.name: _fitted(adapter, base) for adapter in adapters}
        tensors = dict.fromkeys(tensor for _, modules in fitted.values() for tensor in modules)
        self.layers = find_layers(model, base, tensors)
        self.factors = {
            name: {tensor: adapter.factors(modules[tensor]) for tensor in self.layers if tensor in modules}
            for name, (adapter, modules) in fitted.items()
        }
        self.updates = {name: self._updates(*found) for name, found in fitted.items()}
        self.changes = {name: adapter.changes for name, (adapter, _) in fitted.items()}
        self.routed = any(layer.routed for layer in self.layers.values())
        self.apart = self.routed or any(self.changes.values())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.updates)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return next(iter(self.layers.values())).device if device.type == "meta" else device

    def batches(self, texts: Texts, tokens: int = BATCH_TOKENS) -> list[Batch]:
        """Batches of texts, in which adapters are mixed where they can be.

        Raises:
            InputError: texts of an adapter that is not there, or an adapter without texts.
        """
        self.check(texts)
        for name in self.names:
            if not any(example.tokens for example in texts.get(name, ())):
                raise InputError(f"{name}: there are no texts for it")
        return make_batches(texts, tokens, self.apart, padded=not self.routed)

    def check(self, texts: Texts) -> None:
        """
        Raises:
            InputError: there are texts of an adapter that is not there.
        """
        if unknown := [name for name in texts if name not in self.updates]:
            raise InputError(f"there are texts for {unknown[0]}, but adapters are {', '.join(self.names)}")

    @contextmanager
    def alone(self, parts: Sequence[tuple[str, slice]]) -> Iterator[None]:
        """While this lasts the rows of a batch are read by the model with their own adapter each.

        Args:
            parts: as a batch has them
        """
        rows = parts[-1][1].stop
        added: dict[str, Parts] = {}
        for tensor in self.layers:
            own = [(part, self.updates[name][tensor]) for name, part in parts if tensor in self.updates[name]]
            added[tensor] = [(EVERYTHING, own[0][1])] if own and len(parts) == 1 else own
        with ExitStack() as stack:
            stack.enter_context(beside(self.layers.values(), added, rows))
            if len(parts) == 1:
                stack.enter_context(replaced_values(self.model, self._values(parts[0][0])))
            yield

    @contextmanager
    def merged(self, updates: Mapping[str, LoraFactors], scale: float = 1.0) -> Iterator[None]:
        """While this lasts all rows are read by the model with one merged update.

        Args:
            updates: by tensor of the base, in its orientation; tensors without one are the base's
            scale: factor on all of them
        """
        added = {
            tensor: [(EVERYTHING, Update.of(f, self.layer(tensor), scale))] for tensor, f in updates.items()
        }
        with beside([self.layer(tensor) for tensor in updates], added, 1):
            yield

    @torch.no_grad()
    def read(self, batch: Batch) -> None:
        """Let a batch pass through the model, for what hooks see of it.

        Padding is on the right, where no token of a text sees it, and needs no mask.  The head, which is as
        large as many layers, is left out unless it is adapted.
        """
        body = self.model if self.adapts_head else self.model.base_model
        with frozen(self.model):
            body(input_ids=batch.ids.to(self.device), use_cache=False)

    @property
    def adapts_head(self) -> bool:
        head = self.model.get_output_embeddings()
        return any(layer.module is head for layer in self.layers.values())

    def layer(self, tensor: str) -> Layer:
        """
        Raises:
            InputError: no adapter changes that tensor.
        """
        if tensor not in self.layers:
            raise InputError(f"{tensor}: none of {', '.join(self.names)} changes it")
        return self.layers[tensor]

    def _updates(self, adapter: Adapter, modules: Mapping[str, str]) -> dict[str, Update]:
        updates = {}
        for tensor, factors in self.factors[adapter.name].items():
            layer, magnitude = self.layers[tensor], adapter.modules[modules[tensor]].magnitude
            updates[tensor] = Update.of(factors, layer)
            if magnitude is not None:
                updates[tensor] = updates[tensor].with_magnitude(magnitude, layer, self.base)
        return updates

    def _values(self, name: str) -> dict[str, Tensor]:
        """The values of the parameters that an adapter trained directly, by their names in the model.

        Raises:
            InputError: the model has no such parameter, or streams it.
        """
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        names = TensorNames(parameters)
        values = {}
        for tensor, change in self.changes[name].items():
            found = next((n for n in map(names.find, self.base.places(tensor)) if n), None)
            if found is None or parameters[found].is_meta:
                why = "is no parameter of the model in memory" if found is None else "is streamed from disk"
                raise InputError(
                    f"{name}: it trained {tensor} itself, which {why}; give more memory, or leave it out"
                )
            W = parameters[found].detach()
            rows = ... if change.rows is None else change.rows.to(W.device)
            values[found] = W.float().clone()
            values[found][rows] += change.difference(W[rows])
        return values


def _fitted(adapter: Adapter, base: ModelTensors) -> tuple[Adapter, Mapping[str, str]]:
    """The adapter, and `{tensor: module that updates it}`; a full model's have the base's names already."""
    if any(isinstance(module, ExtractedModule) for module in adapter.modules.values()):
        return adapter, adapter.tensors
    return adapter.fit(base)


class Pace:
    """Tells a progress how far a pass over texts is, at every new layer."""

    def __init__(self, stage: str, texts: int, progress: Progress):
        self.stage, self.texts, self.progress = stage, texts, progress
        self.start, self.done = time.monotonic(), 0

    def at(self, names: Sequence[str], texts: int, layer: str = "", share: float = 0.0) -> None:
        """
        Args:
            names: of the adapters whose texts are read
            texts: how many are read in this batch
            layer: which layer reads them
            share: of the layers, those below it
        """
        read = self.done + share * texts
        rate = read / max(1e-9, time.monotonic() - self.start)
        where = f", {layer}" if layer else ""
        stage = (
            f"{self.stage}: {', '.join(Path(name).name for name in names)}{where}, {rate:.2g} texts a second"
        )
        self.progress(stage, min(1.0, read / max(1, self.texts)), None)

    def finished(self, texts: int) -> None:
        self.done += texts
