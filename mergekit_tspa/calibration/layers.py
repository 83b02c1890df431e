"""The layers of a model in memory that adapters change, and updates beside them.

Updates are added by hooks of this package and not by PEFT's mixed batches (`adapter_names=`): the hooks take
every kind of adapter that is read as factors, of mlx-lm, PiSSA or Conv1D layers for instance, need no copy of
the model and no files, and let a layer's update appear while a pass goes on.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from mergekit_tspa.base.names import TensorNames
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.calibration.called import CalledTensor, calls_heard
from mergekit_tspa.errors import InputError
from mergekit_tspa.updates import LoraFactors

Progress: TypeAlias = Callable[[str, float, float | None], None]
"""Hears of long work: what is being done, which fraction is done, and which fraction of an objective is
left.
"""

_ROUTED = re.compile(r"expert[^.]*\.\d+\.")  # the path of a module that sees only tokens routed to it


def silent(stage: str, done: float, left: float | None = None) -> None:
    """The progress that nobody hears of."""


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer; transformers, which takes seconds to import, is imported by now."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


class Layer(NamedTuple):
    """A module of the model, and the tensor of the base that it multiplies with."""

    tensor: str
    path: str
    module: nn.Module

    @property
    def embedding(self) -> bool:
        """Whether its inputs are numbers of rows, which stand for unit vectors."""
        return isinstance(self.module, nn.Embedding)

    @property
    def transposed(self) -> bool:
        """Whether its tensor is stored `(d_in, d_out)`."""
        return self.embedding or _is_conv1d(self.module)

    @property
    def routed(self) -> bool:
        """Whether it sees only the tokens that a router sends to it, in no rows."""
        return _ROUTED.search(f"{self.path}.") is not None

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def device(self) -> torch.device:
        """Where it computes; a streamed layer's values are elsewhere in the meantime."""
        hook = getattr(self.module, "_hf_hook", None)
        execution = getattr(hook, "execution_device", None)
        return self.weight.device if execution is None else torch.device(execution)

    def values(self, base: ModelTensors) -> Tensor:
        """Its tensor, from the base's files where it is streamed."""
        return base.part(self.tensor) if self.weight.is_meta else self.weight.detach()


def find_layers(model: nn.Module, base: ModelTensors, tensors: Iterable[str]) -> dict[str, Layer]:
    """`{tensor of the base: the layer that multiplies with it}`, in the order of the model's modules.

    Raises:
        InputError: a tensor belongs to nothing in the model that multiplies with it.
    """
    finder = _LayerFinder(model, base)
    layers = [finder.find(tensor) for tensor in tensors]
    return {layer.tensor: layer for layer in sorted(layers, key=finder.position)}


class _LayerFinder:
    def __init__(self, model: nn.Module, base: ModelTensors):
        self.base = base
        # A layer that PEFT has wrapped computes in the layer inside, which has the hooks.
        self.modules = {path: getattr(m, "base_layer", m) for path, m in model.named_modules()}
        weighted = [f"{path}.weight" for path, module in self.modules.items() if hasattr(module, "weight")]
        self.weights = TensorNames(weighted)
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.names = TensorNames(self.parameters)
        self.order = {path: position for position, path in enumerate(self.modules)}

    def find(self, tensor: str) -> Layer:
        places = self.base.places(tensor)
        whole = [name for name, index in places.items() if index == ()]
        if name := next((found for found in map(self.weights.find, whole) if found), None):
            path = name.removesuffix(".weight")
            module = self.modules[path]
            if isinstance(module, nn.Linear | nn.Embedding) or _is_conv1d(module):
                return Layer(tensor, path, module)
        for place, index in places.items():
            name = self.names.find(place)
            if name and self.parameters[name].ndim == (3 if index else 2):
                path, _, own = name.rpartition(".")
                called = CalledTensor(self.modules[path], own, index)
                return Layer(tensor, ".".join([path, *map(str, index[:1])]), called)
        raise InputError(
            f"{tensor} of {self.base.name} is no linear layer, embedding or expert of the model; methods "
            "that use examples cannot merge it"
        )

    def position(self, layer: Layer) -> tuple[int, int, int]:
        """Where in the model it is: the module, and of experts which one and from which row on."""
        module = layer.module
        if not isinstance(module, CalledTensor) or module.expert is None:
            return self.order[layer.path], 0, 0
        path = layer.path.rpartition(".")[0]
        return self.order[path], module.expert, module.rows.start or 0


class Update(NamedTuple):
    """What an adapter or a merge adds to the answers of a layer, in the layer's own orientation."""

    B: Tensor  # (d_out, r)
    A: Tensor  # (r, d_in)
    gain: Tensor | None = None  # (d_out,), `m / ||W + B A||` of DoRA

    @classmethod
    def of(cls, factors: LoraFactors, layer: Layer, scale: float = 1.0) -> "Update":
        """
        Args:
            factors: in the orientation in which the base stores the tensor
        """
        B, A = (factors.A.mT, factors.B.mT) if layer.transposed else factors
        B = B if scale == 1 else B * scale
        return cls(B.to(layer.device, torch.float32), A.to(layer.device, torch.float32))

    def with_magnitude(self, magnitude: Tensor, layer: Layer, base: ModelTensors) -> "Update":
        """DoRA's: `W' = diag(m / ||V||) V`, `V = W + B A`, with norms of the rows.

        Args:
            magnitude: m  # (d_out,)
        """
        W = layer.values(base).to(self.B)
        V = torch.addmm(W.mT if layer.transposed else W, self.B, self.A)
        norms = torch.linalg.vector_norm(V, dim=1).clamp_min(torch.finfo(V.dtype).tiny)
        return self._replace(gain=magnitude.to(norms) / norms)

    def answer(self, layer: Layer, x: Tensor, y: Tensor) -> Tensor:
        """The answers `y` of the layer to `x` with this update, in float32.

        Args:
            x: (.., d_in), or `(..)` of numbers of rows
            y: (.., d_out)
        """
        if layer.embedding:
            # Some embeddings multiply what they look up.
            change = (
                torch.nn.functional.embedding(x, self.A.mT)
                @ self.B.mT
                * getattr(layer.module, "embed_scale", 1)
            )
        else:
            change = (x.float() @ self.A.mT) @ self.B.mT
        if self.gain is None:
            return y.float() + change
        bias = getattr(layer.module, "bias", None)
        bias = 0 if bias is None else bias.float()
        return self.gain * (y.float() - bias + change) + bias


Parts: TypeAlias = Sequence[tuple[slice, Update]]  # rows of a batch, and what is added to the answers to them
EVERYTHING = slice(None)


@contextmanager
def beside(layers: Iterable[Layer], updates: Mapping[str, Parts], rows: int) -> Iterator[None]:
    """While this lasts the layers add updates to their answers; the model's tensors are not touched.

    Args:
        updates: by tensor, looked up whenever a layer has answered
        rows: how many texts the batches have
    """

    def hook_of(layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def add(_module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
            parts = updates.get(layer.tensor, ())
            if not parts:
                return None
            if parts[0][0] == EVERYTHING:
                return parts[0][1].answer(layer, args[0], y).to(y.dtype)
            x = in_rows(layer, args[0], rows)
            answers = in_rows(layer, y, rows, answer=True).clone()
            for part, update in parts:
                answers[part] = update.answer(layer, x[part], answers[part]).to(y.dtype)
            return answers.view_as(y)

        return add

    layers = list(layers)
    with ExitStack() as stack:
        stack.enter_context(calls_heard(layer.module for layer in layers))
        for layer in layers:
            stack.callback(layer.module.register_forward_hook(hook_of(layer)).remove)
        yield


def in_rows(layer: Layer, x: Tensor, rows: int, answer: bool = False) -> Tensor:
    """Inputs or answers of a layer as `(texts, tokens, ..)`; some models put all tokens in one row.

    Raises:
        InputError: they are not those of all tokens.
    """
    sides = 2 if layer.embedding and not answer else 3
    if x.ndim == sides and x.shape[0] == rows:
        return x
    if x.ndim == sides - 1 and x.shape[0] % rows == 0:
        return x.view(rows, -1, *x.shape[1:])
    raise InputError(
        f"{layer.tensor}: the layer sees something else than one input a token, {tuple(x.shape)} for {rows} "
        "texts; methods that use examples cannot merge it"
    )


@contextmanager
def replaced_values(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """While this lasts some parameters, by their names in the model, have other values; then their own
    again.
    """
    parameters = {name: model.get_parameter(name) for name in values}
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name].to(parameter)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """While this lasts the model drops nothing out and asks for no gradients; then it is as before."""
    training = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)
