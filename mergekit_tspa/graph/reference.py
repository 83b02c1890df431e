"""`base+lora` references that are read as factors and never merged to disk."""

import torch
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import LoaderCache

from mergekit_tspa.adapters import Adapter, Checkpoint, locate_adapter, read_adapter


class AdapterReference(ModelReference, frozen=True):
    """A `ModelReference` with a LoRA whose loader serves the base's tensors plus the adapter's factors."""

    def merged(self, *args, **kwargs) -> "AdapterReference":
        return self

    def local_path(self, cache_dir: str | None = None, ignore_lora: bool = True) -> str:
        return super().local_path(cache_dir, ignore_lora=True)

    def lazy_loader(self, cache_dir: str | None = None, lazy_unpickle: bool = True) -> "LoraLoader":
        """Read the adapter whole (it is small) and check it against the base's headers."""
        directory = locate_adapter(self.lora.path, self.lora.revision, cache_dir)
        index = self.tensor_index(cache_dir)
        config = self.config(LoaderCache().trust_remote_code).to_dict()
        fitted = read_adapter(directory, str(self.lora)).fit(
            Checkpoint(index.base_path).shapes(), str(self.model), config
        )
        return LoraLoader(index, lazy_unpickle, *fitted)


class LoraLoader(LazyTensorLoader):
    """The tensors of a base model with an adapter applied on the fly; its index is the base's."""

    adapter: Adapter
    modules: dict[str, str]  # base tensor -> adapter module

    def __init__(self, index: ShardedTensorIndex, lazy_unpickle: bool, adapter: Adapter, modules: dict[str, str]):
        super().__init__(index, lazy_unpickle)
        self.adapter, self.modules = adapter, modules

    def get_tensor(self, key: str, device: str = "cpu", **kwargs) -> torch.Tensor | None:
        """`W + B A` in W's dtype.  Only stock tasks that need a dense tensor come here."""
        W = super().get_tensor(key, device, **kwargs)
        if W is None or key not in self.modules:
            return W
        factors = self.adapter.factors(self.modules[key], device=device)
        return torch.addmm(W.float(), *factors).to(W.dtype)
