"""A full model as an adapter: low-rank factors of its difference to the base, made when they are needed."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from mergekit_tspa.adapters.adapter import Adapter
from mergekit_tspa.base.architectures import COMPUTED, EMBEDDINGS, EXPERTS, HEADS, TABLE, VOCABULARY
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.errors import InputError
from mergekit_tspa.linalg import leading_triplets, seed_of
from mergekit_tspa.symmetry.align import AlignedModel
from mergekit_tspa.symmetry.alignment_report import summary
from mergekit_tspa.symmetry.blocks import Kind
from mergekit_tspa.updates import LoraFactors

LOG = logging.getLogger(__name__)

_LOW_RANK = 0.9  # share of a difference that should be in its factors


class Extraction(NamedTuple):
    """How much of a difference `D = W - W_base` its factors hold."""

    rank: int | None = None  # 32 by default; with `energy` the largest, 256 by default
    energy: float | None = None  # the smallest rank that keeps this share of ||D||^2
    align: tuple[Kind, ...] = ()  # by which symmetries the model is aligned to the base before
    device: str | None = None  # where that is found; by default torch's default device

    @property
    def most(self) -> int:
        """The largest rank that the factors may have."""
        return self.rank or (256 if self.energy else 32)


@dataclass(eq=False)
class ExtractedModule:
    """The update `D = W - W_base` of one tensor, as `U_k S_k V_k^T`; takes the place of a `LoraModule`."""

    tensor: str
    shape: tuple[int, int]
    read: Callable[[], tuple[Tensor, Tensor]]  # W, W_base
    extraction: Extraction
    known: LoraFactors | None = None  # the factors, once they were asked for
    kept: float | None = None  # ||U_k S_k V_k^T||^2 / ||D||^2; None: not known yet, or D is zero

    magnitude = base_part = None
    transposed = embedding = convolution = False  # factors of the matrix as it is stored

    @property
    def rank(self) -> int:
        """The rank of its factors; if a share of the energy decides, the largest that it may be."""
        return min(self.extraction.most, *self.shape)

    def factors(self, dtype: torch.dtype, device: torch.device | str | None) -> LoraFactors:
        """`B = U_k sqrt(S_k)`, `A = sqrt(S_k) V_k^T`; made once, in float32, and kept.

        Raises:
            InputError: one of the two tensors contains NaN or Inf.
        """
        if self.known is None:
            W, W_base = self.read()
            factors, self.kept = self._extract(W.to(device, torch.float32) - W_base.to(device))
            self.known = LoraFactors(*(factor.cpu() for factor in factors))  # where adapters keep theirs
        return LoraFactors(*(factor.to(device, dtype) for factor in self.known))

    def _extract(self, D: Tensor) -> tuple[LoraFactors, float | None]:
        energy, wanted, rank = D.square().sum(), self.extraction.energy, self.rank
        if not torch.isfinite(energy):
            raise InputError(f"{self.tensor}: it or the base's contains NaN or Inf")
        if not energy:
            return LoraFactors(D.new_zeros(len(D), rank), D.new_zeros(rank, D.shape[1])), None
        seed = seed_of(self.tensor)
        k = min(rank, 32) if wanted else rank
        while True:
            U, S, Vh = leading_triplets(D, k, seed)
            shares = (S.square().cumsum(0) / energy).clamp(max=1)
            if not wanted or shares[-1] >= wanted or k == rank:
                break
            k = min(2 * k, rank)
        if wanted:
            k = min(int((shares < wanted).sum()) + 1, k)
        root = S[:k].sqrt()
        return LoraFactors(U[:, :k] * root, root[:, None] * Vh[:k]), shares[k - 1].item()


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of a full model that merges as it is; takes the place of a `Change`."""

    read: Callable[[], Tensor]
    rows = None

    def difference(self, W: Tensor) -> Tensor:
        """New value minus old, in float32."""
        return self.read().to(W.device, torch.float32) - W


def extract_adapter(name: str, model: ModelTensors, base: ModelTensors, extraction: Extraction) -> Adapter:
    """A full model as an adapter whose modules and changes have the names of the base's tensors.

    The tensors of linear layers, and those of each expert, become low-rank updates.  Norms, biases,
    embeddings, heads and whatever else is no matrix are changes.  Only headers are read here.

    Raises:
        InputError: the architecture, or the names or shapes of the tensors differ, a tensor is quantised, or
            only one of the two models ties its embedding and head.
    """
    check_architecture(name, model.config, base.name, base.config)
    for side in (model, base):
        if side.config.get("quantization_config") or side.quantised:
            raise InputError(
                f"{side.name}: it is quantised ({min(side.quantised, default='config.json')}), so its "
                "difference to another model means little; use the full-precision checkpoint"
            )
    source = same_tensors(name, model, base)
    aligned = AlignedModel(model, base, extraction.align, extraction.device) if extraction.align else None
    model = aligned or model

    def difference(part: str) -> tuple[Tensor, Tensor]:
        return model.part(part), base.part(part)

    modules: dict[str, ExtractedModule] = {}
    changes: dict[str, StoredTensor] = {}
    for tensor, stored in source.items():
        shape = base.shapes[tensor]
        if len(shape) == 2 and tensor.endswith(".weight") and not TABLE.search(tensor):
            parts = [tensor]
        elif len(shape) == 3 and EXPERTS.search(tensor):
            parts = [f"{tensor}[{expert}]" for expert in range(shape[0])]
        else:
            changes[tensor] = StoredTensor(partial(model.part, stored))
            continue
        for part in parts:
            d_out, d_in = base.shape(part)
            modules[part.removesuffix(".weight")] = ExtractedModule(
                part, (d_out, d_in), partial(difference, part), extraction
            )
    return Adapter(name, None, modules, changes, aligned)  # type: ignore[arg-type]  # of the same use


def check_architecture(
    name: str, config: Mapping[str, Any], base: str, base_config: Mapping[str, Any]
) -> None:
    """
    Raises:
        InputError: the two configurations are of different architectures.
    """
    for key in ("model_type", "architectures"):
        here, there = config.get(key), base_config.get(key)
        if here and there and here != there:
            raise InputError(
                f"{name}: its {key} is {here}, that of the base {base} is {there}; only a full model of the "
                "base's own architecture can be merged into it"
            )


def log_alignment(model: AlignedModel) -> None:
    """Log one line on how far a model was from being aligned, and one on each kind of block left alone."""
    if not model.known:  # nothing of it was merged
        return
    moved = any(aligned.maps for _, aligned in model.known)
    LOG.log(logging.INFO if moved else logging.WARNING, "%s", summary(model))
    for note in model.notes:
        LOG.warning("%s: %s", model.name, note)


def log_kept(adapter: Adapter) -> None:
    """Log one line on how much of a model's differences its factors hold, as a warning if it is little."""
    found: Iterable[object] = adapter.modules.values()  # each a LoraModule, or what takes its place
    modules = [m for m in found if isinstance(m, ExtractedModule) and m.known is not None]
    kept = {m.tensor: m.kept for m in modules if m.kept is not None}  # of those that differ
    if not kept:
        if modules:
            LOG.warning("%s: its %d linear weights equal the base's", adapter.name, len(modules))
        return
    worst = min(kept, key=kept.__getitem__)
    ranks = sorted(m.known.rank for m in modules if m.known is not None and m.kept is not None)
    low_rank = kept[worst] >= _LOW_RANK
    LOG.log(
        logging.INFO if low_rank else logging.WARNING,
        "%s: of %d weights %d differ from the base's; factors of rank %s keep %.1f %% of ||W - W_base||^2 "
        "on average, %.1f %% of %s%s",
        adapter.name,
        len(modules),
        len(kept),
        ranks[0] if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}",
        100 * sum(kept.values()) / len(kept),
        100 * kept[worst],
        worst,
        "" if low_rank else "; the rest is lost: raise extract_rank, or give extract_energy",
    )


def same_tensors(
    name: str, model: ModelTensors, base: ModelTensors, resized: tuple[str, ...] = ()
) -> dict[str, str]:
    """`{base tensor: tensor of the model}`; a head that is tied to the embedding may be stored or not.

    Args:
        resized: ends of names of tensors that may have other shapes

    Raises:
        InputError: the names or shapes differ, or only one of the two models ties its embedding and head.
    """
    if base.config and model.tied != base.tied:
        tied = name if model.tied else f"the base {base.name}"
        raise InputError(f"{name}: only {tied} ties embedding and head to one tensor; untie them there first")
    here, there = ({t for t in side.shapes if not COMPUTED.search(t)} for side in (model, base))
    source = {tensor: tensor for tensor in base.shapes if tensor in there}
    if model.tied:
        embedding = next((t for t in model.shapes if t.endswith(EMBEDDINGS)), None)
        source |= {t: embedding for t in there - here if t.endswith(HEADS) and embedding}
        here = {t for t in here if t in there or not t.endswith(HEADS)}
    for owner, other, missing in (
        (base.name, name, set(source.values()) - here),
        (name, base.name, here - there),
    ):
        if missing:
            raise InputError(
                f"{name}: {len(missing)} tensors of {owner} are not in {other}, {min(missing)} among them; a "
                "full model must have exactly the tensors of the base: save both with the same version of "
                "transformers, and merge adapters into it first"
            )
    for tensor, stored in source.items():
        if model.shapes[stored] != base.shapes[tensor] and not tensor.endswith(resized):
            _refuse_shape(name, stored, model, base)
    return source


def _refuse_shape(name: str, tensor: str, model: ModelTensors, base: ModelTensors) -> NoReturn:
    here, there = model.shapes[tensor], base.shapes[tensor]
    vocabulary = tensor.endswith(VOCABULARY) and here[1:] == there[1:]
    way_out = (
        f"resize the base to {here[0]} tokens first (resize_token_embeddings)"
        if vocabulary
        else "use its own base"
    )
    raise InputError(f"{name}: {tensor} has shape {here}, but {there} in {base.name}; {way_out}")
