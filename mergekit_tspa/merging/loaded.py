"""Merge adapters that are loaded in a PEFT model, by any method; PEFT's own is `add_weighted_adapter`."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer, LoraModel
from torch.nn import Parameter

from mergekit_tspa.adapters import LoraModule
from mergekit_tspa.adapters.kinds import kinds_of
from mergekit_tspa.base.geometry import AttentionGeometry
from mergekit_tspa.errors import InputError
from mergekit_tspa.merging.api import merge_adapters
from mergekit_tspa.merging.finish import low_rank
from mergekit_tspa.methods import METHODS
from mergekit_tspa.updates import LoraFactors

LOG = logging.getLogger(__name__)


@torch.no_grad()
def add_merged_adapter(
    model: PeftModel,
    adapters: Sequence[str],
    name: str,
    weights: Sequence[float] | None = None,
    method: str = "core_tsv",
    examples: Any = None,
    tokenizer: Any = None,
    **parameters: Any,
) -> None:
    """Merge adapters of a model and add the result to it as one more adapter.

    The new adapter is neither active nor trained.  It is an ordinary LoRA adapter of scale 1 on the layers
    that were merged, all of one rank, in the precision of the adapters there; `set_adapter`,
    `save_pretrained`, and `delete_adapter` treat it as any other.

    Args:
        model: adapters of any ranks and modules, none of them merged into the base.
        adapters: names of loaded adapters.
        name: of the new one.
        weights: one number per adapter, 1 by default; an adapter of weight 0 takes no part.
        method: a name of `mergekit_tspa.METHODS`; for those with dense updates give `rank`.
        examples: for methods that look at texts, as in `merge_adapters`; this model reads them.
        tokenizer: of the model, for these methods.
        **parameters: of the method, as in `merge_adapters`.

    Raises:
        InputError: the model or an adapter is not of that kind, or `merge_adapters` refuses it.  The model
            is then as it was.
    """
    adapters = _checked(model, adapters, name)
    base = model.get_base_model()
    layers = {path: layer for path, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    if any(layer.merged for layer in layers.values()):
        raise InputError("an adapter is merged into the base: call model.unmerge_adapter() first")
    row = METHODS.get(method) if isinstance(method, str) else None
    if row and row.result.dense and parameters.get("rank") is None:
        raise InputError(f"{method} makes dense updates, which no adapter can hold: give rank=")

    context: dict[str, Any] = {"device": next(model.parameters()).device}
    if row and (row.attention or row.guided):
        context["base"] = _tensors(base)
    if row and (row.attention or "start" in parameters):  # of distill
        context["geometry"] = AttentionGeometry.from_config(LoraModel.get_model_config(base))
    if row and row.guided:
        context |= {"model": base, "tokenizer": tokenizer, "examples": examples}
    if known := sorted(context.keys() & parameters.keys()):
        raise InputError(f"{known[0]}: it is that of the model in memory; leave it out")
    factors = [{path: _read(layer, a) for path, layer in layers.items() if _pair(layer, a)} for a in adapters]
    with _switched_off(model) if row and row.guided else nullcontext():
        merged = merge_adapters(method, factors, weights, **context, **parameters)
    if not merged:
        raise InputError("every weight is 0: there is nothing to merge")
    updates = {path: low_rank(update) for path, update in merged.items()}
    rank = max(update.rank for update in updates.values())

    configs = [model.peft_config[adapter] for adapter in adapters]
    config = LoraConfig(
        task_type=configs[0].task_type,
        r=rank,
        lora_alpha=rank,
        target_modules=list(updates),
        fan_in_fan_out=any(getattr(config, "fan_in_fan_out", False) for config in configs),
    )
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    model.add_adapter(name, config)
    for path, update in updates.items():
        dtype = next(pair[0].dtype for a in adapters if (pair := _pair(layers[path], a)))
        _write(layers[path], name, update.padded(rank), dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


@contextmanager
def _switched_off(model: PeftModel) -> Iterator[None]:
    """While this lasts the model is the base alone; then what is trained in it is as before."""
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, was in trained.items():
            parameter.requires_grad_(was)


def _checked(model: PeftModel, adapters: Sequence[str], name: str) -> list[str]:
    """The names of the adapters.

    Raises:
        InputError: this is no LoRA model, a name does not fit it, or an adapter is more than its factors.
    """
    if not isinstance(model, PeftModel) or model.peft_type != PeftType.LORA:
        raise InputError(
            "the model is no PeftModel with LoRA adapters: load some with PeftModel.from_pretrained"
        )
    loaded = model.peft_config
    listed = isinstance(adapters, Iterable) and not isinstance(adapters, str | Mapping)
    names = list(adapters) if listed else []
    if not listed or not all(isinstance(adapter, str) for adapter in names) or len({*names}) < len(names):
        raise InputError(f"adapters must be a list of different names, not {adapters!r}")
    if unknown := [adapter for adapter in names if adapter not in loaded]:
        raise InputError(f"no adapter {unknown[0]!r} is loaded; loaded are {', '.join(loaded)}")
    if name in loaded:
        raise InputError(
            f"there is already an adapter {name!r}: take another name, or model.delete_adapter it first"
        )
    if not isinstance(name, str) or not name or "." in name:
        raise InputError(f"{name!r} cannot name an adapter: it must be text, not empty and without a dot")
    for adapter in names:
        kinds = kinds_of(vars(loaded[adapter]))
        more = [kind.flag for kind in kinds if not kind.in_memory]
        if more:
            raise InputError(
                f"adapter {adapter!r} has {' and '.join(more)}, which a merge of LoRA factors would lose; "
                "save it and merge it into a checkpoint instead, by a recipe"
            )
        if any(kind.alters_base for kind in kinds):
            LOG.warning(
                "adapter %r (%s) took a part out of the base's tensors, which is merged and weighted with "
                "the rest of it; the result belongs to the tensors as they are in this model, not to the "
                "original checkpoint",
                adapter,
                getattr(loaded[adapter], "init_lora_weights", None),
            )
    return names


def _tensors(base: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The base's tensors under the names they have without PEFT."""
    tensors = {key.replace(".base_layer.", "."): tensor for key, tensor in base.state_dict().items()}
    return {key: tensor for key, tensor in tensors.items() if LoraModel.prefix not in key}


def _pair(layer: Any, adapter: str) -> tuple[Parameter, Parameter] | None:
    """`B (d_out, r ..)` and `A (r, d_in ..)`; a convolution's have the dimensions of its kernel besides."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
    if adapter in layer.lora_A:
        return layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
    return None


def _transposed(layer: LoraLayer) -> bool:
    """Whether the base stores `(d_in, d_out)`."""
    return bool(layer.lora_embedding_A) or getattr(layer, "fan_in_fan_out", False)


def _read(layer: LoraLayer, adapter: str) -> LoraFactors:
    """An adapter's update in the base's orientation and float32, its scale folded in."""
    pair = _pair(layer, adapter)
    assert pair is not None
    B, A = (factor.flatten(1) for factor in pair)
    return LoraModule(B, A, layer.scaling[adapter], _transposed(layer)).factors(torch.float32, None)


def _write(layer: LoraLayer, adapter: str, update: LoraFactors, dtype: torch.dtype) -> None:
    """Give an adapter of scale 1 the update of a layer's tensor, in the base's orientation."""
    B, A = (update.A.T, update.B.T) if _transposed(layer) else update
    pair = _pair(layer, adapter)
    assert pair is not None
    for parameter, factor in zip(pair, (B, A)):
        parameter.data = torch.empty_like(parameter, dtype=dtype).copy_(factor.reshape(parameter.shape))
