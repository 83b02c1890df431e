"""What a planned merge would write and take, and what is worth a warning before it starts (`mergekit-tspa
check`).
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import NamedTuple

import torch

from mergekit_tspa.adapters import Adapter, Change, ExtractedModule, LoraModule, TurnedModule
from mergekit_tspa.linalg import gram
from mergekit_tspa.merging.bases import other_base
from mergekit_tspa.merging.outputs import TensorPlan
from mergekit_tspa.merging.plan import Chunk, MergePlan
from mergekit_tspa.methods.emr_records import DESCRIPTION, RECORDS
from mergekit_tspa.methods.method import Method
from mergekit_tspa.updates import LoraFactors

IMPORTS = 400 * 2**20  # what mergekit's own imports take
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_FAR = 4  # how many times smaller than what it cuts `rank` may be without a warning


def _norm(f: LoraFactors) -> float:
    """`||B A||` from Grams in float32, good to six digits, in less than a third of the time of float64."""
    return (gram(f.B).double() * gram(f.A.mT).double()).sum().clamp(min=0).sqrt().item()


class SeenAdapter(NamedTuple):
    """An adapter that could be read, or a full model as one, and what its configuration calls it."""

    adapter: Adapter
    kind: str
    norms: dict[str, float]  # ||dW|| by module, where it can be said without a model's tensors

    @classmethod
    def of(cls, adapter: Adapter, kind: str) -> "SeenAdapter":
        """Measure an adapter; what depends on the base's tensors has no norm."""
        known = [
            name
            for name, module in adapter.modules.items()
            if module.base_part is None and not isinstance(module, TurnedModule)
        ]
        return cls(adapter, kind, {name: _norm(adapter.factors(name)) for name in known})

    @property
    def norm(self) -> float | None:
        """Of its whole update."""
        return math.hypot(*self.norms.values()) if self.norms.keys() == self.adapter.modules.keys() else None

    @property
    def stored(self) -> list[LoraModule]:
        """Its modules as they are on disk; a full model has none."""
        return [module for module in self.adapter.modules.values() if isinstance(module, LoraModule)]

    @property
    def nbytes(self) -> int:
        """Of what is kept in memory of it."""
        modules, changes = self.adapter.modules.values(), self.adapter.changes.values()
        tensors = [tensor for module in self.stored for tensor in (module.B, module.A)]
        tensors += [change.value for change in changes if isinstance(change, Change)]
        made = sum(
            4 * module.rank * sum(module.shape)
            for module in modules
            if isinstance(module, ExtractedModule | TurnedModule)
        )
        return made + sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))

    def warnings(self, method: Method, base: str | None) -> Iterator[str]:
        """
        Args:
            base: that of the merge, if it exists already
        """
        adapter = self.adapter
        if zeros := [name for name, norm in self.norms.items() if not norm]:
            tail = "; it takes no part there" if method.drops_zeros else ""
            yield f"{adapter.name}: its update of {len(zeros)} weights is zero, {zeros[0]} among them{tail}"
        if said := other_base(adapter, base):
            yield said

    def row(self, weight: str, median: float) -> list[str]:
        """Cells of the table of adapters: kind, rank, number of modules, dtype, norm, weight."""
        modules = self.adapter.modules
        ranks = {module.A.shape[0] for module in self.stored} or {module.rank for module in modules.values()}
        norm = "needs the base" if self.norm is None else f"{self.norm:.4g}"
        return [
            self.kind,
            " to ".join(str(rank) for rank in sorted({min(ranks), max(ranks)})) if ranks else "-",
            str(len(modules)),
            ", ".join(sorted({str(module.A.dtype).removeprefix("torch.") for module in self.stored})) or "-",
            f"{norm} ({self.norm / median:.2g}x)" if self.norm and median else norm,
            weight,
        ]

    def about(self) -> str:
        """What is too long for the table: which modules, what was trained directly, and the base."""
        modules = self.adapter.modules
        layers = sorted({name.partition("[")[0].rpartition(".")[2] for name in modules})
        apart = "trained directly" if self.stored or not modules else "merged as they are"
        parts = [
            " ".join(layers),
            f"{len(self.adapter.changes)} tensors {apart}" if self.adapter.changes else "",
            f"trained on {PurePath(self.adapter.base).name}" if self.adapter.base else "",
        ]
        return "; ".join(filter(None, parts))


class StoredAs(NamedTuple):
    """How many values a tensor of the output has, and of which dtype."""

    values: int
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.values * itemsize(self.dtype)


class AdapterOutcome(NamedTuple):
    """The adapter that a merge could write."""

    tensors: Sequence[TensorPlan]
    dtype: torch.dtype


@dataclass(frozen=True)
class Forecast:
    """What a planned merge writes, and what it takes."""

    plan: MergePlan
    base: str
    stored: Mapping[str, StoredAs | None]  # the output's tensors; None for those that the base does not have
    chunks: Sequence[Chunk]
    adapter: AdapterOutcome | str  # or why there is none
    wants_adapter: bool
    aligned: bool  # whether mergekit aligns the vocabulary
    safetensors: bool  # the output's format
    shard_limit: int  # largest shard of the output; 0 for no limit
    base_shard: int  # size of the base's largest file
    base_mapped: bool  # whether the base's files are mapped, not read whole

    @property
    def extracts(self) -> bool:
        """Whether it makes factors of full models, whose ranks are not known for certain."""
        return any(
            isinstance(module, ExtractedModule) for plan in self.plan.tensors for module in plan.modules
        )

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.stored.values() if stored)

    def rank(self, tensor: TensorPlan) -> int:
        """Of the merged update of a tensor, at most."""
        carried = self.plan.method.carried(tensor.planned)
        return min(tensor.parameters.rank or carried, carried)

    def warnings(self) -> Iterator[str]:
        carried = {tensor.name: self.plan.method.carried(tensor.planned) for tensor in self.plan.tensors}
        if cut := [
            tensor for tensor in self.plan.tensors if _FAR * self.rank(tensor) <= carried[tensor.name]
        ]:
            most = max(cut, key=lambda tensor: carried[tensor.name])
            yield (
                f"rank {self.rank(most)} cuts {len(cut)} merged updates, of rank up to {carried[most.name]} "
                f"({most.name})"
            )
        if missing := [name for name, found in self.stored.items() if found is None]:
            yield f"{self.base} lacks {len(missing)} tensors of the output, {missing[0]} among them"

    def rows(
        self, adapters: Sequence[SeenAdapter], reading: Mapping[str, int] | None = None
    ) -> Iterator[tuple[str, str]]:
        """What to print: a label and a sentence each.

        Args:
            reading: bytes that reading texts takes, by what takes them
        """
        yield "model", self._model()
        if self.plan.method.record:
            yield "records", f"{RECORDS} and {DESCRIPTION} beside it"
        yield "adapter", self._adapter()
        yield "memory", self._memory(adapters, reading or {})

    def _model(self) -> str:
        changed = f"{len(self.plan.changed)} of {len(self.stored)} tensors changed"
        return f"{files_of(self.stored, self.safetensors, self.shard_limit, self.aligned)}, {changed}"

    def _adapter(self) -> str:
        if isinstance(self.adapter, str):
            return f"none can be written: {self.adapter}"
        rank = max(map(self.rank, self.adapter.tensors))
        dtype = self.adapter.dtype
        nbytes = sum(rank * sum(tensor.shape) for tensor in self.adapter.tensors) * dtype.itemsize
        most = " at most" if self.extracts or not self.plan.method.result.exact else ""
        where = (
            "adapter/adapter_model.safetensors" if self.wants_adapter else "can be written (adapter: true)"
        )
        precision = str(dtype).removeprefix("torch.")
        return f"{where}, rank {rank}{most}, {precision}, {nbytes:,} bytes ({size(nbytes)}){most}"

    @property
    def _shard_size(self) -> int:
        """Of the output."""
        return shard_size(self.nbytes, self.shard_limit)

    def _memory(self, adapters: Sequence[SeenAdapter], reading: Mapping[str, int]) -> str:
        """An upper estimate of the peak, by what is held at once."""
        method, stored = self.plan.method, self.stored
        largest = max((4 * s.values for name in self.plan.changed if (s := stored[name])), default=0)
        merged = sum(4 * self.rank(tensor) * sum(tensor.shape) for tensor in self.plan.tensors)
        aligned = [model.nbytes for model in (seen.adapter.aligned for seen in adapters) if model]
        parts = {
            "mergekit": IMPORTS,
            **reading,
            "adapters": sum(adapter.nbytes for adapter in adapters),
            "a chunk to merge": max((chunk.nbytes for chunk in self.chunks), default=0),
            "merged updates": merged if method.solves or self.wants_adapter else 0,
            "aligning a block": max(aligned, default=0),
            "a tensor in float32": (3 if self.extracts or method.result.dense else 2) * largest,
            "a shard of the output": self._shard_size,
            "a shard of the base": 0 if self.base_mapped else self.base_shard,
        }
        total = at_most(parts)
        if not self.base_mapped:
            return total
        return f"{total}; beside it the base's shards of up to {size(self.base_shard)} are mapped"


def files_of(
    stored: Mapping[str, StoredAs | None], safetensors: bool, shard_limit: int, aligned: bool
) -> str:
    """What a model of these tensors is on disk, in one sentence.

    Args:
        aligned: whether mergekit aligns the vocabulary
    """
    known = [tensor for tensor in stored.values() if tensor]
    nbytes = sum(tensor.nbytes for tensor in known)
    file = "model.safetensors" if safetensors else "pytorch_model.bin"
    shards = math.ceil(nbytes / shard_size(nbytes, shard_limit))
    files = file if shards == 1 else f"about {shards} shards of {file}"
    dtypes = {tensor.dtype for tensor in known}
    precision = " and ".join(sorted({_DTYPES.get(dtype, dtype.removeprefix("torch.")) for dtype in dtypes}))
    before = " before the vocabulary is aligned" if aligned else ""
    return f"{files}, {nbytes:,} bytes ({size(nbytes)}){before}, {precision}"


def shard_size(nbytes: int, limit: int) -> int:
    """Of the largest shard of an output of so many bytes; a limit of 0 is none."""
    return min(n for n in (limit, nbytes) if n > 0)


def at_most(parts: Mapping[str, int]) -> str:
    """How much memory these parts take together, in one sentence."""
    listed = ", ".join(f"{what} {size(nbytes)}" for what, nbytes in parts.items() if nbytes)
    return f"about {size(sum(parts.values()))} at most ({listed})"


def itemsize(dtype: str) -> int:
    """Bytes of a value, of a dtype as mergekit, safetensors or torch spell it."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 1


def size(nbytes: int) -> str:
    unit, name = next(
        ((2**n, name) for n, name in ((30, "GiB"), (20, "MiB")) if nbytes >= 2**n), (2**10, "KiB")
    )
    return f"{nbytes / unit:.1f} {name}"
