"""References to adapters, and to full models as such, that are read as factors and never merged to disk."""

from collections.abc import Callable, Iterable, KeysView
from functools import cached_property
from typing import Any

import torch
from transformers import PretrainedConfig

from mergekit_tspa.adapters import (
    Adapter,
    Extraction,
    check_reachable,
    extract_adapter,
    locate_adapter,
    read_adapter,
    turn_adapter,
)
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.tensors import Index, ModelTensors
from mergekit_tspa.merging.finish import apply_adapter
from mergekit_tspa.plugin.compat import (
    LazyTensorLoader,
    LoaderCache,
    MergeConfiguration,
    ModelReference,
    ShardedTensorIndex,
)
from mergekit_tspa.symmetry.align import AlignedModel
from mergekit_tspa.symmetry.blocks import Kind


class AdapterReference(ModelReference, frozen=True):
    """A `ModelReference` with a LoRA whose loader serves the base's tensors plus the adapter's factors."""

    def merged(self, *args: Any, **kwargs: Any) -> "AdapterReference":
        """This reference itself: nothing is merged to disk."""
        return self

    def local_path(self, cache_dir: str | None = None, ignore_lora: bool = True) -> str:
        """The base's directory, from which mergekit takes the tokenizer and other files."""
        return super().local_path(cache_dir, ignore_lora=True)

    def lazy_loader(self, cache_dir: str | None = None, lazy_unpickle: bool = True) -> "LoraLoader":
        """Read the adapter whole (it is small) and check it against the base's headers."""
        directory = locate_adapter(self.lora.path, self.lora.revision, cache_dir)
        index = self.tensor_index(cache_dir)
        config = self.config(LoaderCache().trust_remote_code).to_dict()
        base = ModelTensors.of(str(self.model), Checkpoint(index.base_path), config)
        return LoraLoader(index, lazy_unpickle, base, *read_adapter(directory, str(self.lora)).fit(base))


class FullModelReference(AdapterReference, frozen=True):
    """A full model whose loader serves the base's tensors plus factors of its difference to them."""

    base: ModelReference
    extraction: Extraction

    def lazy_loader(self, cache_dir: str | None = None, lazy_unpickle: bool = True) -> "LoraLoader":
        """Check the model against the base by their headers; its weights are read when they are merged."""
        base, model = (_tensors(reference, cache_dir) for reference in (self.base, self))
        adapter = extract_adapter(str(self.model), model, base, self.extraction)
        return LoraLoader(self.base.tensor_index(cache_dir), lazy_unpickle, base, adapter, adapter.tensors)


class TurnedReference(AdapterReference, frozen=True):
    """An adapter on a full model beside the base, which turns as that model does when it is aligned."""

    base: ModelReference
    extraction: Extraction

    def lazy_loader(self, cache_dir: str | None = None, lazy_unpickle: bool = True) -> "LoraLoader":
        """Fit the adapter to its own model, and check that model against the base, by their headers."""
        base, model = (_tensors(reference, cache_dir) for reference in (self.base, self))
        aligned = AlignedModel(model, base, self.extraction.align, self.extraction.device)
        directory = locate_adapter(self.lora.path, self.lora.revision, cache_dir)
        adapter, tensors = read_adapter(directory, str(self.lora)).fit(model)
        adapter = turn_adapter(adapter, tensors, aligned)
        return LoraLoader(self.base.tensor_index(cache_dir), lazy_unpickle, base, adapter, tensors)


class AlignedReference(ModelReference, frozen=True):
    """A full model whose loader serves its tensors as they are once it is aligned."""

    base: ModelReference
    kinds: tuple[Kind, ...]
    device: str | None

    def lazy_loader(self, cache_dir: str | None = None, lazy_unpickle: bool = True) -> "AlignedLoader":
        """Check the model against the base by their headers."""
        base, model = (_tensors(reference, cache_dir) for reference in (self.base, self))
        aligned = AlignedModel(model, base, self.kinds, self.device)
        return AlignedLoader(self.tensor_index(cache_dir), lazy_unpickle, aligned)


def config_of(reference: ModelReference, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration of the full model of a reference.

    Raises:
        Exception: there is none, of one of the dozen types that transformers and the hub raise.
    """
    check_reachable(reference.model.path, reference.model.revision)
    return reference.config(trust_remote_code)


def _tensors(reference: ModelReference, cache_dir: str | None) -> ModelTensors:
    """The tensors of the full model of a reference."""
    return ModelTensors.of(
        str(reference.model),
        Checkpoint(reference.local_path(cache_dir, ignore_lora=True)),
        reference.config(LoaderCache().trust_remote_code).to_dict(),
    )


def base_loader(config: MergeConfiguration) -> LazyTensorLoader:
    """The loader of the base that a completed recipe has."""
    assert config.base_model is not None
    return LoaderCache().get(config.base_model)


def adapter_loader(reference: ModelReference) -> "LoraLoader":
    """The loader of an `AdapterReference`."""
    loader = LoaderCache().get(reference)
    assert isinstance(loader, LoraLoader)
    return loader


class AlignedLoader(LazyTensorLoader):
    """The tensors of an aligned model."""

    def __init__(self, index: ShardedTensorIndex, lazy_unpickle: bool, aligned: AlignedModel):
        super().__init__(index, lazy_unpickle)
        self.aligned = aligned

    def get_tensor(self, key: str, device: str = "cpu", **kwargs: Any) -> torch.Tensor | None:
        """The aligned tensor in its own dtype; what mergekit answers where there is none."""
        if key not in self.aligned.shapes:
            return super().get_tensor(key, device, **kwargs)
        return self.aligned.whole(key).to(device)


class LoraLoader(LazyTensorLoader):
    """The tensors of a base model with an adapter applied on the fly; its index is the base's."""

    base: ModelTensors
    adapter: Adapter
    modules: dict[str, str]  # base tensor, or expert of a fused one -> adapter module

    def __init__(
        self,
        index: ShardedTensorIndex,
        lazy_unpickle: bool,
        base: ModelTensors,
        adapter: Adapter,
        modules: dict[str, str],
    ):
        super().__init__(index, lazy_unpickle)
        self.base, self.adapter, self.modules = base, adapter, modules

    @property
    def adapted(self) -> KeysView[str]:
        """Base tensors, or experts of fused ones, that the adapter changes; in the adapter's order."""
        return {**self.modules, **self.adapter.changes}.keys()

    def parts(self, name: str) -> dict[str, Index]:
        """What the adapter changes of a tensor, by its name on disk or at run time, and where."""
        # The names at run time come from a table of all models of transformers that takes a while to build.
        on_disk = name in self.base.shapes
        return (self._parts_on_disk if on_disk else self._parts_by_every_name).get(name, {})

    @cached_property
    def _parts_on_disk(self) -> dict[str, dict[str, Index]]:
        return self._parts_by(lambda part: [self.base.place(part)])

    @cached_property
    def _parts_by_every_name(self) -> dict[str, dict[str, Index]]:
        return self._parts_by(lambda part: self.base.places(part).items())

    def _parts_by(self, places: Callable[[str], Iterable[tuple[str, Index]]]) -> dict[str, dict[str, Index]]:
        parts: dict[str, dict[str, Index]] = {}
        for part in self.adapted:
            for tensor, index in places(part):
                parts.setdefault(tensor, {})[part] = index
        return parts

    def get_tensor(self, key: str, device: str = "cpu", **kwargs: Any) -> torch.Tensor | None:
        """The adapted tensor in its base's dtype.  Only stock tasks that need a dense tensor come here."""
        W = super().get_tensor(key, device, **kwargs)
        parts = self.parts(key)
        return apply_adapter(W, self.adapter, self.modules, parts, device) if parts and W is not None else W
