"""Every kind of adapter, in one table: how it is recognised, and what is done with it.

The reader, its refusals, the labels that `check` shows, merges of adapters in memory (`merging/loaded.py`)
and the table of docs/adapters.md go by it.

So a new kind is one row of `KINDS`.  The following one has `"use_newlora": true` in its configuration, and
its factors cannot be read as an update:

    Kind(
        "NewLoRA",
        flag="use_newlora",
        read=False,
        what="a NewLoRA adapter",
        way_out=MERGE_FIRST,
        in_memory=False,
    ),

An initialisation `init_lora_weights: "newinit"` that leaves the base alone is

    Kind("NewInit", init="newinit", update=PLAIN),

and one that takes a part out of the base also names the function that computes this part (`base_part`).
"""

import logging
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mergekit_tspa.adapters.altered import olora_part, pissa_part
from mergekit_tspa.errors import InputError
from mergekit_tspa.updates import LoraFactors

LOG = logging.getLogger(__name__)

PLAIN = "`s B A`"
MERGE_FIRST = "merge it into its base with PEFT's merge_and_unload and use the merged checkpoint"
TO_LORA = f"convert it to LoRA with PEFT's save_as_lora, or {MERGE_FIRST}"  # of kinds that PEFT can convert
_CONVERT = "its base was altered at training; convert it with PEFT's path_initial_model_for_weight_conversion"
_DIRECTLY = "a tensor trained directly"


class TakenPart(Protocol):
    """Computes what training took out of a tensor of the base."""

    def __call__(self, W: Tensor, rank: int, scale: float) -> LoraFactors: ...


@dataclass(frozen=True)
class Kind:
    """A kind of adapter."""

    name: str  # as its paper and PEFT call it

    # How it is recognised: by one of these.
    flag: str = ""  # key of adapter_config.json that is set
    init: str = ""  # pattern of the whole value of init_lora_weights, in lower case
    peft_type: str = ""  # pattern of the whole value of peft_type
    tensors: str = ""  # pattern of names of tensors, without PEFT's prefixes, that no LoRA of PEFT has

    # What is done with it.
    read: bool = True  # False: refused
    update: str = ""  # what it makes of the base's tensor W, for the docs
    label: str = ""  # as `check` shows it; without one it counts as LoRA
    what: str = ""  # what it is, in the sentence that refuses it
    way_out: str = ""  # what the user should do, or why nothing can be done
    training_only: str = ""  # pattern of names of tensors that are needed for its training only
    base_part: TakenPart | None = None  # what it took out of the base

    # In a PEFT model in memory.
    in_memory: bool = True  # whether it may be merged there: there is nothing to it but its factors
    alters_base: bool = (
        False  # whether training took a part out of the base, of which the user is then warned
    )


MLX = Kind("mlx-lm", flag="fine_tune_type", update="`scale (a b)^T`", label="mlx-lm", in_memory=False)

# The order is that of labels and of refusals: the first kind that fits is the one named.
KINDS = (
    Kind(
        "DoRA",
        flag="use_dora",
        update="directions and magnitudes, see below",
        label="DoRA",
        in_memory=False,
    ),
    Kind("rsLoRA", flag="use_rslora", update="`s B A` with `s = alpha / sqrt(r)`", label="rsLoRA"),
    Kind(
        "bias of `lora_B`",
        flag="lora_bias",
        update="`s` times it is added to the layer's bias",
        in_memory=False,
    ),
    Kind("biases", flag="bias", update=_DIRECTLY, in_memory=False),
    Kind("saved modules", flag="modules_to_save", update=_DIRECTLY, in_memory=False),
    Kind("tokens", flag="trainable_token_indices", update="rows trained directly", in_memory=False),
    Kind(
        "fused experts", flag="target_parameters", update="`s B_e A_e` for each expert `e`", in_memory=False
    ),
    Kind(
        "BD-LoRA",
        flag="use_bdlora",
        update="`s B A`, the compact factor expanded to its block diagonal",
        label="BD-LoRA",
        in_memory=False,
    ),
    MLX,
    Kind("VeLoRA", flag="velora_config", update=PLAIN, training_only=r"\.lora_velora_embed(\.|$)"),
    Kind(
        "MonteCLoRA", flag="monteclora_config", update=PLAIN, training_only=r"\.lora_monteclora_sampler(\.|$)"
    ),
    Kind(
        "QALoRA",
        flag="use_qalora",
        read=False,
        what="a QALoRA adapter",
        way_out="it pools its inputs and cannot be merged into a tensor",
        in_memory=False,
    ),
    Kind(
        "aLoRA",
        flag="alora_invocation_tokens",
        read=False,
        what="an activated LoRA (aLoRA)",
        way_out="it acts on some tokens only and cannot be merged",
        in_memory=False,
    ),
    Kind(
        "Arrow",
        flag="arrow_config",
        read=False,
        what="an Arrow router",
        way_out="it picks adapters per token and cannot be merged",
        in_memory=False,
    ),
    Kind(
        "KaSA",
        flag="kasa_config",
        tensors=r"\.lora_diag(\.|$)",
        read=False,
        what="a KaSA adapter",
        way_out=MERGE_FIRST,
        in_memory=False,
        alters_base=True,
    ),
    Kind(
        "layer replication",
        flag="layer_replication",
        read=False,
        what="an adapter with layer_replication",
        way_out="its base has other layers; build that base first",
        in_memory=False,
    ),
    Kind("gaussian or orthogonal start", init="gaussian|orthogonal", update=PLAIN),
    Kind("EVA", init="eva", update=PLAIN),
    Kind("MiCA", init="mica", update=PLAIN),
    Kind(
        "PiSSA",
        init="pissa",
        update="`s B A` less the `r` largest singular triplets of `W`, of rank `2r`",
        label="PiSSA",
        base_part=pissa_part,
        alters_base=True,
    ),
    Kind(
        "OLoRA",
        init="olora",
        update="`s B A - s Q_r R_r` of `W = Q R`, of rank `2r`",
        label="OLoRA",
        base_part=olora_part,
        alters_base=True,
    ),
    # These alter the base in a way that cannot be repeated here: by chance, by data, or by quantisation.
    Kind("PiSSA by a randomised SVD", init="pissa_niter.*", read=False, way_out=_CONVERT, alters_base=True),
    Kind("CorDA", init="corda.*", read=False, way_out=_CONVERT, alters_base=True),
    Kind("LoftQ", init="loftq.*", read=False, way_out=_CONVERT, alters_base=True),
    Kind("LoRA-GA", init="lora_ga.*", read=False, way_out=_CONVERT, alters_base=True),
    Kind(
        "LoHa",
        peft_type="LOHA",
        tensors=r"\.hada_w",
        read=False,
        what="a LoHa adapter",
        way_out=TO_LORA,
        in_memory=False,
    ),
    Kind(
        "LoKr",
        peft_type="LOKR",
        tensors=r"\.lokr_w",
        read=False,
        what="a LoKr adapter",
        way_out=TO_LORA,
        in_memory=False,
    ),
    Kind(
        "MiSS",
        peft_type="MISS",
        tensors=r"\.miss_block",
        read=False,
        what="a MiSS adapter",
        way_out=TO_LORA,
        in_memory=False,
    ),
    Kind(
        "VeRA",
        peft_type="VERA",
        tensors=r"\.vera_lambda",
        read=False,
        what="a VeRA adapter",
        way_out=TO_LORA,
        in_memory=False,
    ),
    Kind(
        "VB-LoRA, Uni-LoRA, TinyLoRA, RandLoRA, GraLoRA, DeLoRA, C3A, FourierFT, WaveFT, PSOFT",
        peft_type="VBLORA|UNILORA|TINYLORA|RANDLORA|GRALORA|DELORA|C3A|FOURIERFT|WAVEFT|PSOFT",
        read=False,
        what="an adapter of another kind than LoRA",
        way_out=TO_LORA,
        in_memory=False,
    ),
    Kind(
        "IA3",
        peft_type="IA3",
        tensors=r"\.ia3_l",
        read=False,
        what="an IA3 adapter",
        way_out=MERGE_FIRST,
        in_memory=False,
    ),
    Kind(
        "AdaLoRA",
        peft_type="ADALORA",
        tensors=r"\.lora_E$|\.ranknum$",
        read=False,
        what="an AdaLoRA adapter",
        way_out=MERGE_FIRST,
        in_memory=False,
    ),
    Kind(
        "OFT, BOFT",
        peft_type="OFT|BOFT",
        tensors=r"\.(oft|boft)_",
        read=False,
        what="an OFT adapter",
        way_out=MERGE_FIRST,
        in_memory=False,
    ),
    Kind(
        "kohya's format",
        tensors=r"\.lora_(down|up)\.|^lora_(unet|te)",
        read=False,
        what="a kohya-style adapter",
        way_out="convert it to the PEFT format",
        in_memory=False,
    ),
    Kind(
        "mlx-lm without its configuration",
        tensors=r"\.lora_[ab]$",
        read=False,
        what="an mlx-lm adapter",
        way_out="put it beside the adapter_config.json that mlx-lm wrote",
        in_memory=False,
    ),
    Kind(
        "any other",
        tensors=r"\.lora_",
        read=False,
        what="no known kind of LoRA",
        way_out=MERGE_FIRST,
        in_memory=False,
    ),
)


def kinds_of(config: Mapping[str, Any]) -> list[Kind]:
    """The kinds that a configuration says an adapter is of; none for a plain LoRA.

    Args:
        config: `adapter_config.json`, or the fields of a `LoraConfig`.
    """
    init = _init(config)
    return [
        kind
        for kind in KINDS
        if (kind.flag and (config.get(kind.flag) or "none") != "none")
        or (kind.init and re.fullmatch(kind.init, init, re.DOTALL))
    ]


def label_of(config: Mapping[str, Any]) -> str:
    """Such as `LoRA` or `DoRA, PiSSA`."""
    return ", ".join(kind.label for kind in kinds_of(config) if kind.label) or "LoRA"


def check_kinds(config: Mapping[str, Any], name: str) -> None:
    """Refuse an adapter by its configuration, and warn of an initialisation that is not known.

    Raises:
        InputError: it is of a kind that cannot be read as an update of the base's tensors.
    """
    found = kinds_of(config)
    init = config.get("init_lora_weights", True)
    for kind in found:
        if not kind.read:
            what = kind.what or f"initialised with {reprlib.repr(init)}, which"
            raise InputError(f"{name}: {what} is not supported; {kind.way_out}")
    if init not in (True, False) and not any(kind.init for kind in found):
        LOG.warning("%s: init_lora_weights is %r, unknown here; read as a plain LoRA", name, init)


def check_type(config: Mapping[str, Any], name: str) -> None:
    """
    Raises:
        InputError: `peft_type` of the configuration is not that of LoRA.
    """
    found = config.get("peft_type")
    if found == "LORA":
        return
    kind = next((k for k in KINDS if k.peft_type and re.fullmatch(k.peft_type, str(found))), None)
    raise InputError(
        f"{name}: peft_type is {reprlib.repr(found)}, not 'LORA', and cannot be read as factors; "
        f"{_way_out(kind) if kind else MERGE_FIRST}"
    )


def check_tensor(key: str, file: Path) -> None:
    """
    Raises:
        InputError: a tensor of this name belongs to something other than a LoRA of PEFT.
    """
    for kind in KINDS:
        if kind.tensors and re.search(kind.tensors, key):
            raise InputError(
                f"{file}: tensor {key} belongs to {kind.what}, which is not supported; {_way_out(kind)}"
            )


def _way_out(kind: Kind) -> str:
    """What the user should do; a conversion is named only where the PEFT that is installed has it."""
    import peft

    return MERGE_FIRST if kind.way_out == TO_LORA and not hasattr(peft, "save_as_lora") else kind.way_out


def _init(config: Mapping[str, Any]) -> str:
    init = config.get("init_lora_weights")
    return init.lower() if isinstance(init, str) else ""
