"""LoRA on fused experts: a tensor `(experts, d_out, d_in)` and a packed pair of factors per projection."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_tspa.adapters.modules import LoraModule
from mergekit_tspa.adapters.on_disk import Factor, part_of, rows_of
from mergekit_tspa.base.architectures import EXPERT_CONTAINER, EXPERT_PARAMETERS
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.errors import InputError

# PEFT wraps a module once per targeted parameter, in the order in which the module declares them.
_NESTED = ".base_layer"


def name_parameters(modules: Iterable[str], config: Mapping[str, Any], file: Path) -> dict[str, str]:
    """`{module: parameter it adapts}` for modules that wrap parameters (`target_parameters`).

    The file gives no parameter names: `experts.base_layer.lora_A` belongs to the first targeted parameter of
    `experts`, `experts.lora_A` to the last.

    Raises:
        InputError: the configuration's parameters do not tell which is which.
    """
    nests: dict[str, list[str]] = {}
    for module in modules:
        nests.setdefault(module.replace(_NESTED, ""), []).append(module)
    named: dict[str, str] = {}
    for root, nest in nests.items():
        if len(nest) == 1 and not root.endswith(f".{EXPERT_CONTAINER}"):
            continue
        leaves = {
            target.rpartition(".")[2]
            for target in config.get("target_parameters") or ()
            if f".{root}.{target.rpartition('.')[2]}".endswith(f".{target}")
        }
        known = [leaf for leaf in EXPERT_PARAMETERS if leaf in leaves] if len(leaves) > 1 else list(leaves)
        if len(known) != len(nest):
            raise InputError(
                f"{file}: {root} has {len(nest)} pairs of factors, but target_parameters of "
                f"adapter_config.json names {sorted(leaves) or 'none'} of its parameters; only "
                f"{' and '.join(EXPERT_PARAMETERS)}, or a single one, can be told apart"
            )
        nest.sort(key=lambda module: -module.count(_NESTED))
        named |= {module: f"{root}.{leaf}" for module, leaf in zip(nest, known)}
    return named


def unpack(B: Factor, A: Factor, rank: int, layout: str | None) -> list[tuple[Factor, Factor]]:
    """The factors `(B_e, A_e)` of each expert, from `B (d_out, r experts)` and `A (experts r, d_in)`.

    In `A` an expert's rows lie together.  In `B` its columns are spread (`rank_major`, PEFT's layout), or
    lie together too (`grouped_by_expert`, as some of Unsloth's files say).

    Args:
        rank: of one expert, r
        layout: `lora_B_layout` of the configuration
    """
    n = A.shape[0] // rank
    spread = layout != "grouped_by_expert"
    return [
        (
            part_of(B, partial(_columns, expert=e, rank=rank, spread=spread), (B.shape[0], rank)),
            rows_of(A, slice(e * rank, (e + 1) * rank)),
        )
        for e in range(n)
    ]


def _columns(B: Tensor, expert: int, rank: int, spread: bool) -> Tensor:
    """Those of an expert.  # (d_out, r experts) -> (d_out, r)"""
    return B[:, expert :: B.shape[1] // rank] if spread else B[:, expert * rank : (expert + 1) * rank]


def settle(modules: Mapping[str, LoraModule], base: ModelTensors, adapter: str) -> dict[str, LoraModule]:
    """Give modules of experts, `parameter[expert]`, the names and shapes that the base's checkpoint has.

    Where it has one tensor for all experts, they are called `tensor[expert]`, transposed if it is stored as
    `(experts, d_in, d_out)`.  Where it has a tensor per expert and projection, each gets its rows of `B`.

    Raises:
        InputError: the base has another number of experts.
    """
    settled = {name: module for name, module in modules.items() if "[" not in name}
    fused: dict[str, list[LoraModule]] = {}
    for name, module in modules.items():
        if name not in settled:
            fused.setdefault(name.partition("[")[0], []).append(module)
    for name, experts in fused.items():
        tensor, parts = base.find(name), base.find_parts(name)
        there = base.shapes[tensor][0] if tensor else len({expert for expert, *_ in parts.values()})
        if there not in (0, len(experts)):
            raise InputError(
                f"{adapter}: it has factors for {len(experts)} experts of {name}, but {base.name} has "
                f"{there} of them; use the base the adapter was trained on"
            )
        if parts and not tensor:
            for part, (expert, rows) in parts.items():
                assert isinstance(expert, int) and isinstance(rows, slice)
                B = rows_of(experts[expert].B, rows)
                settled[part.removesuffix(".weight")] = experts[expert]._replace(B=B)
        else:
            turned = tensor is not None and _transposed(experts[0], tensor, base)
            for expert, module in enumerate(experts):
                settled[f"{tensor or name}[{expert}]"] = module._replace(transposed=turned)
    return settled


def _transposed(module: LoraModule, tensor: str, base: ModelTensors) -> bool:
    """Whether the base stores `(experts, d_in, d_out)`.

    Where both orientations fit, the shape of the other projection tells which it is.
    """
    _, *shape = base.shapes[tensor]
    if shape[0] != shape[1]:
        return module.shape != tuple(shape)
    stem, _, leaf = tensor.rpartition(".")
    gate_up, down = EXPERT_PARAMETERS
    other = base.shapes.get(f"{stem}.{down if leaf == gate_up else gate_up}")
    return other is not None and other[1] < other[2]
