"""Read a PEFT LoRA adapter from disk, or refuse it by name.

What decides is the file's tensors, not `target_modules`; the configuration gives the scale and the flags that
change what the tensors mean.  Rank and alpha patterns are looked up with PEFT's own function.
"""

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_tspa.adapters.factors import LoraFactors
from mergekit_tspa.adapters.names import match_modules, strip_prefixes
from mergekit_tspa.errors import InputError

LOG = logging.getLogger(__name__)

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_MERGE_FIRST = "merge it into its base with PEFT's merge_and_unload and use the merged checkpoint"
_CONVERT = "its base was altered at training; convert it with PEFT's path_initial_model_for_weight_conversion"

# Configuration flags whose adapters are not (yet) plain low-rank updates: {key: (what it is, way out)}.
_REFUSED_FLAGS = {
    "use_dora": ("a DoRA adapter", _MERGE_FIRST),
    "lora_bias": ("LoRA with a bias on lora_B", _MERGE_FIRST),
    "modules_to_save": ("an adapter with fully trained modules (modules_to_save)", _MERGE_FIRST),
    "trainable_token_indices": ("an adapter with trained token embeddings", _MERGE_FIRST),
    "target_parameters": ("LoRA on fused expert parameters (target_parameters)", _MERGE_FIRST),
    "use_bdlora": ("a block-diagonal LoRA (BD-LoRA)", _MERGE_FIRST),
    "kasa_config": ("a KaSA adapter", _MERGE_FIRST),
    "alora_invocation_tokens": ("an activated LoRA (aLoRA)", "it acts on some tokens only and cannot be merged"),
    "use_qalora": ("a QALoRA adapter", "it pools its inputs and cannot be merged into a weight"),
    "arrow_config": ("an Arrow router", "it picks adapters per token and cannot be merged"),
    "layer_replication": ("an adapter with layer_replication", "its base has other layers; build that base first"),
}
# Values of init_lora_weights that changed the base at training; every other value leaves the plain reading right.
_REFUSED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")

# Tensor names, after the prefixes, that belong to something other than LoRA on a linear layer.
_REFUSED_TENSORS = (
    (r"\.lora_magnitude_vector(\.|$)", "a DoRA adapter", _MERGE_FIRST),
    (r"\.lora_embedding_[AB]", "LoRA on an embedding", _MERGE_FIRST),
    (r"\.lora_B(\.\w+)?\.bias$", "LoRA with a bias on lora_B", _MERGE_FIRST),
    (r"\.trainable_tokens_", "an adapter with trained token embeddings", _MERGE_FIRST),
    (r"\.hada_w", "a LoHa adapter", _MERGE_FIRST),
    (r"\.lokr_w", "a LoKr adapter", _MERGE_FIRST),
    (r"\.ia3_l", "an IA3 adapter", _MERGE_FIRST),
    (r"\.vera_lambda", "a VeRA adapter", _MERGE_FIRST),
    (r"\.lora_E$|\.ranknum$", "an AdaLoRA adapter", _MERGE_FIRST),
    (r"\.(oft|boft)_", "an OFT adapter", _MERGE_FIRST),
    (r"\.lora_(diag|velora_embed|monteclora_sampler)", "a LoRA variant with extra tensors", _MERGE_FIRST),
    (r"\.lora_(down|up)\.|^lora_(unet|te)", "a kohya-style adapter", "convert it to the PEFT format"),
    (r"\.lora_[ab]$", "an mlx-lm adapter", "convert it to the PEFT format"),
    (r"\.base_layer\.weight$", "LoRA on an embedding or head saved with its base weight", _MERGE_FIRST),
    (r"\.bias$", "an adapter with trained biases", _MERGE_FIRST),
)
# transformers' Conv1D stores (d_in, d_out).
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LAYERS = ("c_attn", "c_fc", "c_proj", "q_attn")
_HEADS = ("lm_head.weight", "embed_out.weight")
_LORA_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(\.(?P<name>[^.]+))?\.weight$")


class _Module(NamedTuple):
    """One adapted module as stored: factors in the file's dtype, and how to read them."""

    A: Tensor  # (r, d_in)
    B: Tensor  # (d_out, r)
    scale: float
    transposed: bool  # the base stores (d_in, d_out), as GPT-2's Conv1D does

    @property
    def shape(self) -> tuple[int, int]:
        shape = self.B.shape[0], self.A.shape[1]
        return shape[::-1] if self.transposed else shape

    def factors(self, dtype: torch.dtype, device: torch.device | str | None) -> LoraFactors:
        A, B = self.A.to(device, dtype), self.B.to(device, dtype)
        return LoraFactors(*((A.T, B.T) if self.transposed else (B, A))).scaled(self.scale)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter in memory, in the file's precision."""

    name: str
    base: str | None  # base_model_name_or_path, as its author wrote it
    modules: Mapping[str, _Module]

    @classmethod
    def from_factors(cls, name: str, factors: Mapping[str, tuple[Tensor, Tensor]]) -> "Adapter":
        """An adapter from `{module: (B, A)}` with the scale folded in."""
        for module, (B, A) in factors.items():
            if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
                raise InputError(
                    f"{name}: factors of {module} have shapes {tuple(B.shape)} and {tuple(A.shape)}; "
                    "expected B (d_out, r) and A (r, d_in)"
                )
            if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
                raise InputError(f"{name}: a factor of {module} contains NaN or Inf")
        return cls(name, None, {module: _Module(A, B, 1.0, False) for module, (B, A) in factors.items()})

    def factors(
        self, module: str, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> LoraFactors:
        return self.modules[module].factors(dtype, device)

    def fit(
        self, shapes: Mapping[str, tuple[int, ...]], base: str, config: Mapping[str, Any] | None = None
    ) -> tuple["Adapter", dict[str, str]]:
        """Match the adapter to a base model: itself, and `{base tensor: module that updates it}`.

        PEFT goes by a layer's class and ignores `fan_in_fan_out` where it contradicts it, so the orientation
        of each module is settled here: by the base's `config` where its model has Conv1D layers, else by the flag.

        Raises:
            InputError: a module has no tensor in the base, a tensor of another shape, or one tied to another.
        """
        tensors = {tensor: module for module, tensor in match_modules(self.modules, shapes, self.name, base).items()}
        config = config or {}
        tied = (config.get("text_config") or config).get("tie_word_embeddings", config.get("tie_word_embeddings"))
        modules = dict(self.modules)
        for tensor, module in tensors.items():
            if tied and tensor.endswith(_HEADS):
                raise InputError(
                    f"{self.name}: it adapts {tensor}, which {base} ties to its embedding; untie the base first, "
                    "or train without it"
                )
            found = modules[module]
            if config.get("model_type") in _CONV1D_MODELS:
                found = found._replace(transposed=tensor.split(".")[-2] in _CONV1D_LAYERS)
            if found.shape != tuple(shapes[tensor]):
                trained_on = f" (the adapter says it was trained on {self.base})" if self.base else ""
                raise InputError(
                    f"{self.name}: the update of {module} has shape {found.shape} but {tensor} of "
                    f"{base} has {tuple(shapes[tensor])}; use the base the adapter was trained on{trained_on}"
                )
            modules[module] = found
        return replace(self, modules=modules), tensors


def read_adapter(path: str | os.PathLike, name: str | None = None) -> Adapter:
    """Read a PEFT LoRA adapter directory.

    Covered: LoRA on linear layers with `rank_pattern`, `alpha_pattern`, `use_rslora` and `fan_in_fan_out`, any
    set of modules, safetensors or `.bin` (loaded with `weights_only=True`), fp16, bf16 or fp32.

    Raises:
        InputError: files are missing or damaged, the adapter is of another kind, or a factor is not finite.
    """
    directory = Path(path)
    name = name or str(path)
    config = _read_config(directory, name)
    _refuse_config(config, name)
    file = next((directory / f for f in WEIGHT_FILES if (directory / f).is_file()), None)
    if file is None:
        raise InputError(f"{name}: no {' or '.join(WEIGHT_FILES)} beside adapter_config.json in {directory}")
    pairs = _pair_factors(_read_tensors(file), file)
    modules = {
        module: _Module(A, B, _scale(config, module, A.shape[0], file), bool(config.get("fan_in_fan_out")))
        for module, (A, B) in pairs.items()
    }
    return Adapter(name, config.get("base_model_name_or_path"), modules)


def _read_config(directory: Path, name: str) -> dict[str, Any]:
    file = directory / "adapter_config.json"
    if not directory.is_dir():
        raise InputError(f"{name}: there is no adapter directory {directory}")
    if not file.is_file():
        found = [f for f in WEIGHT_FILES if (directory / f).exists()]
        hint = f" (it does hold {found[0]})" if found else ""
        raise InputError(f"{name}: {directory} has no adapter_config.json{hint}; is it a PEFT adapter?")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); save the adapter again") from error
    if not isinstance(config, dict):
        raise InputError(f"{file}: holds a {type(config).__name__} where an object is expected")
    return config


def _refuse_config(config: Mapping[str, Any], name: str) -> None:
    kind = config.get("peft_type")
    if kind is None and "fine_tune_type" in config:
        raise InputError(f"{name}: an mlx-lm adapter is not supported; convert it to the PEFT format")
    if kind != "LORA":
        raise InputError(f"{name}: peft_type is {kind!r}, not 'LORA', and cannot be read as factors; {_MERGE_FIRST}")
    for flag, (what, way_out) in _REFUSED_FLAGS.items():
        if config.get(flag):
            raise InputError(f"{name}: {what} is not supported; {way_out}")
    if config.get("bias", "none") != "none":
        raise InputError(f"{name}: trained biases (bias: {config['bias']!r}) are not supported; {_MERGE_FIRST}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_REFUSED_INITS):
        raise InputError(f"{name}: initialised with {init!r}, which is not supported: {_CONVERT}")
    if init not in _PLAIN_INITS:
        LOG.warning("%s: init_lora_weights is %r, unknown here; read as a plain LoRA", name, init)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and pickle raise a dozen unrelated types for damaged files
        raise InputError(f"{file}: damaged or truncated ({error}); copy or save the adapter again") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise InputError(f"{file}: does not hold a dictionary of tensors")
    return tensors


def _pair_factors(tensors: Mapping[str, Tensor], file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Pair `lora_A` and `lora_B` by module, checking names, shapes and values."""
    sides: dict[str, dict[str, Tensor]] = {}
    adapter_names = set()
    for key, tensor in tensors.items():
        key = strip_prefixes(key)
        match = _LORA_KEY.match(key)
        if match is None:
            _refuse_tensor(key, file)
        adapter_names.add(match["name"])
        if tensor.numel() == 0:
            raise InputError(
                f"{file}: {key} is empty; it was saved under DeepSpeed ZeRO-3 without gathering, save it again "
                "with stage3_gather_16bit_weights_on_model_save"
            )
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise InputError(
                f"{file}: {key} is a {tensor.dtype} tensor of shape {tuple(tensor.shape)}; "
                "only LoRA on linear layers (two-dimensional floating-point factors) is supported"
            )
        if not torch.isfinite(tensor).all():
            raise InputError(f"{file}: {key} contains NaN or Inf; the training diverged or the file is damaged")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if len(adapter_names) > 1:
        raise InputError(f"{file}: holds several adapters ({', '.join(map(str, adapter_names))}); save one per file")
    if not sides:
        raise InputError(f"{file}: holds no LoRA tensors")
    for module, pair in sides.items():
        if len(pair) != 2:
            (side,) = pair
            raise InputError(
                f"{file}: {module} has lora_{side} but no lora_{'AB'[side == 'A']}; the file is incomplete"
            )
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise InputError(
                f"{file}: {module} has lora_A of shape {tuple(pair['A'].shape)} and lora_B of shape "
                f"{tuple(pair['B'].shape)}, whose ranks differ"
            )
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _refuse_tensor(key: str, file: Path):
    for pattern, what, way_out in _REFUSED_TENSORS:
        if re.search(pattern, key):
            raise InputError(f"{file}: tensor {key} belongs to {what}, which is not supported; {way_out}")
    if key.endswith(".weight"):
        raise InputError(
            f"{file}: tensor {key} is a fully trained weight (modules_to_save), which is not supported; {_MERGE_FIRST}"
        )
    raise InputError(f"{file}: tensor {key} is of no known kind; {_MERGE_FIRST}")


def _scale(config: Mapping[str, Any], module: str, rank: int, file: Path) -> float:
    """The LoRA scale `alpha / r`, or `alpha / sqrt(r)` for rsLoRA, with PEFT's pattern rules."""
    from peft.utils.other import get_pattern_key

    def setting(pattern: str, default: str):
        values = config.get(pattern) or {}
        return values.get(get_pattern_key(values.keys(), module), config.get(default))

    declared, alpha = setting("rank_pattern", "r"), setting("alpha_pattern", "lora_alpha")
    if declared != rank:
        raise InputError(
            f"{file}: {module} has rank {rank} but adapter_config.json says r = {declared}, so its scale is unknown; "
            "restore the configuration it was saved with"
        )
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise InputError(f"{file}: lora_alpha of {module} is {alpha!r} where a number is expected")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
