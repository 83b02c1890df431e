"""An adapter that was trained on another model than the base, turned as that model is when it is aligned."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from mergekit_tspa.adapters.adapter import Adapter
from mergekit_tspa.adapters.modules import LoraModule
from mergekit_tspa.errors import InputError
from mergekit_tspa.symmetry.align import AlignedModel
from mergekit_tspa.updates import LoraFactors


@dataclass(frozen=True, eq=False)
class TurnedModule:
    """The update `L B A R` of one tensor `W` that becomes `L W R`; takes the place of a `LoraModule`."""

    of: LoraModule
    tensor: str
    model: AlignedModel

    magnitude = base_part = None  # what was taken out of the base is taken out of the factors

    @property
    def dtype(self) -> torch.dtype:
        """That of the file."""
        return self.of.B.dtype

    @property
    def transposed(self) -> bool:
        """Whether the base stores the tensor `(d_in, d_out)`."""
        return self.of.transposed

    @property
    def embedding(self) -> bool:
        """Whether it updates an embedding."""
        return self.of.embedding

    @property
    def convolution(self) -> bool:
        """Whether it updates a convolution."""
        return self.of.convolution

    @property
    def rank(self) -> int:
        """The rank of its factors."""
        return self.of.rank

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the tensor that it updates."""
        return self.of.shape

    def factors(self, dtype: torch.dtype, device: torch.device | str | None) -> LoraFactors:
        """`L B` and `A R`, in the orientation of the tensor."""
        B, A = self.of.factors(torch.float32, device)
        turned = self.model.turned(self.tensor, B, (0,)), self.model.turned(self.tensor, A, (1,))
        return LoraFactors(*(factor.to(dtype) for factor in turned))


def turn_adapter(adapter: Adapter, tensors: Mapping[str, str], model: AlignedModel) -> Adapter:
    """The same adapter on a model that is being aligned.

    Args:
        adapter: fitted to that model
        tensors: `{tensor of the model: module that updates it}`

    Raises:
        InputError: it has magnitudes (DoRA), or trained directly a tensor that is turned.
    """
    turned = {tensor for block in model.blocks for tensor in block.tensors}
    for tensor, module in tensors.items():
        if adapter.modules[module].magnitude is not None:
            raise InputError(
                f"{adapter.name}: the DoRA magnitudes of {tensor} belong to the rows of {model.name}, and "
                "cannot turn with it; merge the adapter into that model first"
            )
    if directly := sorted(turned & adapter.changes.keys()):
        raise InputError(
            f"{adapter.name}: it trained {directly[0]} directly, which turns with {model.name}; merge the "
            "adapter into that model first"
        )
    modules = {
        module: TurnedModule(adapter.modules[module], tensor, model) for tensor, module in tensors.items()
    }
    # It names the base that it was trained on, which is another one than that of the merge.
    return replace(adapter, base=None, modules=modules, aligned=model)  # type: ignore[arg-type]  # of the same use
