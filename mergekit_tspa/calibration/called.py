"""Tensors that a module multiplies with by itself, the experts of a layer for instance, as layers with hooks.

The experts of a layer are one parameter `(experts, d_out, d_in)`, of which the layer's own code takes one
expert after the other.  Here such a part is a module without parameters.  While `calls_heard` lasts it is
called with every input that is multiplied with the part, and what its hooks make of the answer takes the
answer's place.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mergekit_tspa.base.tensors import Index


class CalledTensor(nn.Module):
    """A parameter of a module, or one expert's rows of it."""

    def __init__(self, owner: nn.Module, name: str, index: Index):
        """index: nothing, the expert, or the expert and which of its rows."""
        super().__init__()
        self._owner = (owner,)  # a tuple, so that it is no part of this module
        self.name, self.index = name, index

    @property
    def owner(self) -> nn.Module:
        return self._owner[0]

    @property
    def expert(self) -> int | None:
        return self.index[0] if self.index and isinstance(self.index[0], int) else None

    @property
    def rows(self) -> slice:
        rows = self.index[1] if len(self.index) > 1 else slice(None)
        assert isinstance(rows, slice)
        return rows

    @property
    def weight(self) -> Tensor:
        parameter: Tensor = getattr(self.owner, self.name)
        return parameter[self.index] if self.index else parameter

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The answer to x, as it is where no hook changes it."""
        return y

    def is_multiplied(self, W: Tensor) -> bool:
        """Whether W is the matrix of which this tensor is rows, or all."""
        parameter: Tensor = getattr(self.owner, self.name)
        whole = parameter if self.expert is None else parameter[self.expert]
        same = W.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        return same and W.storage_offset() == whole.storage_offset() and W.shape == whole.shape


@contextmanager
def calls_heard(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While this lasts those of the modules that are `CalledTensor`s are called; others are called anyway."""
    parts: dict[nn.Module, list[CalledTensor]] = {}
    for module in modules:
        if isinstance(module, CalledTensor):
            parts.setdefault(module.owner, []).append(module)
    with ExitStack() as stack:
        for owner, own in parts.items():
            stack.enter_context(_one_by_one(owner))
            mode = _Products(own)
            # The mode lasts as long as a call of the owner; other modules run at full speed.
            before = owner.register_forward_pre_hook(lambda *_, mode=mode: mode.__enter__() and None)
            after = owner.register_forward_hook(
                lambda *_, mode=mode: mode.__exit__(None, None, None), always_call=True
            )
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


class _Products(TorchFunctionMode):
    """Passes products with some tensors on to them."""

    def __init__(self, parts: Sequence[CalledTensor]):
        super().__init__()
        self.parts = parts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if func is not nn.functional.linear or len(args) < 2:
            return y
        called = [part for part in self.parts if part.is_multiplied(args[1])]
        if not called:
            return y
        y = y.clone()
        for part in called:
            y[..., part.rows] = part(args[0], y[..., part.rows])
        return y


@contextmanager
def _one_by_one(owner: nn.Module) -> Iterator[None]:
    """While this lasts experts are multiplied one after the other, not in one product for all."""
    config = getattr(owner, "config", None)
    chosen = getattr(config, "_experts_implementation", None)
    if chosen is None:
        yield
        return
    try:
        config._experts_implementation = "eager"  # type: ignore[union-attr]
        yield
    finally:
        config._experts_implementation = chosen  # type: ignore[union-attr]
