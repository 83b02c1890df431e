"""A dry run of a merge, from the adapters and the headers of the models alone (`mergekit-tspa check`).

Only whether a full model leaves room for an adapter as the result is seen from its norms, biases and embeddings.
"""

import logging
import math
import os
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeVar

import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from pydantic import ValidationError
from rich.console import Console
from rich.table import Column, Table

from mergekit_tspa.adapters import Adapter, Change, ExtractedModule, LoraModule, kind_of, locate_adapter, read_adapter
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.errors import InputError
from mergekit_tspa.insight.inspection import short_names
from mergekit_tspa.merging.plan import TensorPlan
from mergekit_tspa.methods import METHODS, Method
from mergekit_tspa.methods.emr_records import DESCRIPTION, RECORDS
from mergekit_tspa.plugin.adapter_output import adapter_task, make_planner, weight_ranges
from mergekit_tspa.plugin.merge_method import ADAPTER
from mergekit_tspa.plugin.recipe import faults, filters, sources
from mergekit_tspa.plugin.references import AdapterReference, FullModelReference
from mergekit_tspa.plugin.tasks import ApplyUpdates

T = TypeVar("T")

_IMPORTS = 400 * 2**20  # what mergekit's own imports take
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_FAR = 4  # how many times smaller than what it cuts `rank` may be without a warning


class ReadAdapter(NamedTuple):
    """An adapter that could be read, or a full model as one, and what its configuration calls it."""

    adapter: Adapter
    kind: str
    norms: dict[str, float]  # ||dW|| by module, where it can be said without a model's weights

    @classmethod
    def of(cls, reference: ModelReference, fit: bool) -> "ReadAdapter":
        """Read it and, if it can be done, fit it to its base.

        Raises:
            InputError: it is not readable or does not fit.
        """
        if isinstance(reference, FullModelReference):
            return cls(LoaderCache().get(reference).adapter, "full model", {})
        lora = reference.lora
        directory = locate_adapter(lora.path, lora.revision, LoaderCache().hf_cache_dir)
        if fit and isinstance(reference, AdapterReference):
            adapter = LoaderCache().get(reference).adapter
        else:
            adapter = read_adapter(directory, str(lora))
        known = [name for name, module in adapter.modules.items() if module.base_part is None]
        return cls(adapter, kind_of(directory), {name: adapter.factors(name).norm().item() for name in known})

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
        tensors = [t for module in self.stored for t in (module.A, module.B)]
        tensors += [change.value for change in changes if isinstance(change, Change)]
        made = sum(4 * module.rank * sum(module.shape) for module in modules if isinstance(module, ExtractedModule))
        return made + sum(t.nbytes for t in tensors)

    def warnings(self, method: Method, base: ModelReference | None) -> Iterator[str]:
        adapter = self.adapter
        if zeros := [name for name, norm in self.norms.items() if not norm]:
            tail = "; it takes no part there" if method.drops_zeros else ""
            yield f"{adapter.name}: its update of {len(zeros)} weights is zero, {zeros[0]} among them{tail}"
        if adapter.base and base and _last(adapter.base) != _last(base.model.path):
            yield f"{adapter.name}: it says that it was trained on {adapter.base}, and the recipe merges on {base}"

    def row(self, weight: str, median: float) -> list[str]:
        modules = self.adapter.modules
        ranks = {len(module.A) for module in self.stored} or {module.rank for module in modules.values()}
        layers = {name.partition("[")[0].rpartition(".")[2] for name in modules}
        apart = "trained directly" if self.stored or not modules else "merged as they are"
        changes = f"; {len(self.adapter.changes)} tensors {apart}" if self.adapter.changes else ""
        norm = "needs the base" if self.norm is None else f"{self.norm:.4g}"
        return [
            self.kind,
            " to ".join(str(rank) for rank in sorted({min(ranks), max(ranks)})) if ranks else "-",
            f"{len(modules)}: {' '.join(sorted(layers))}{changes}",
            ", ".join(sorted({str(module.A.dtype).removeprefix("torch.") for module in self.stored})) or "-",
            f"{norm} ({self.norm / median:.2g}x)" if self.norm and median else norm,
            weight,
            PurePath(self.adapter.base).name if self.adapter.base else "-",
        ]


class Output:
    """What a planned merge writes, and what it takes."""

    def __init__(self, planner: MergePlanner):
        self.planner, self.config, self.options = planner, planner.config, planner.options
        self.method = METHODS[self.config.merge_method]
        self.applied = {w.name: task for w, task in planner._tensors if isinstance(task, ApplyUpdates)}
        self.wants_adapter = bool((self.config.parameters or {}).get(ADAPTER.name))

    @cached_property
    def plans(self) -> list[TensorPlan]:
        """Of the weights that the method merges."""
        return [part.plan for task in self.applied.values() for part in task.parts if part.update]

    @property
    def extracts(self) -> bool:
        """Whether it makes factors of full models, whose ranks are not known for certain."""
        return any(isinstance(module, ExtractedModule) for plan in self.plans for module in plan.modules)

    @cached_property
    def tensors(self) -> dict[str, tuple[int, str] | None]:
        """Number of values and dtype of the output's tensors; None for those that the base does not have."""
        config, loader = self.config, LoaderCache().get(self.config.base_model)
        checkpoint = Checkpoint(loader.index.base_path)
        base = ModelTensors.of(str(config.base_model), checkpoint)
        tensors = {}
        for weight, task in self.planner._tensors:
            load = getattr(task, "base", task)
            if not isinstance(load, LoadTensor):  # its vocabulary is aligned
                names = {"aliases": weight.aliases, "tied_names": weight.tied_names}
                load = LoadTensor(model=config.base_model, tensor=weight.name, **names)
            name = load._resolve_name(loader)
            stored = [checkpoint.headers[part] for part in ([name] if name else base.find_parts(load.tensor))]
            tensors[weight.name] = None
            if stored:
                dtype = weight.force_dtype or config.out_dtype or config.dtype or stored[0][1]
                tensors[weight.name] = sum(math.prod(shape) for shape, _ in stored), dtype
        return tensors

    @property
    def nbytes(self) -> int:
        return sum(values * _itemsize(dtype) for values, dtype in filter(None, self.tensors.values()))

    def rank(self, plan: TensorPlan) -> int:
        """Of the merged update of a weight, at most."""
        return min(plan.parameters.rank or math.inf, self.method.carried(plan.planned))

    def warnings(self) -> Iterator[str]:
        if cut := [plan for plan in self.plans if _FAR * self.rank(plan) <= self.method.carried(plan.planned)]:
            plan = max(cut, key=lambda plan: self.method.carried(plan.planned))
            carried = self.method.carried(plan.planned)
            yield f"rank {self.rank(plan)} cuts {len(cut)} merged updates, of rank up to {carried} ({plan.name})"
        planned = [weight.name for weight, _ in self.planner._tensors]
        for unmatched in sorted(f for f in filters(self.config) if not any(f in name for name in planned)):
            yield f"filter {unmatched!r} is in the name of no tensor"
        if missing := [name for name, found in self.tensors.items() if found is None]:
            yield f"{self.config.base_model} lacks {len(missing)} tensors of the output, {missing[0]} among them"

    def rows(self, adapters: list[ReadAdapter]) -> Iterator[tuple[str, str]]:
        """What to print: a label and a sentence each."""
        yield "model", self._model()
        if self.method.record:
            yield "records", f"{RECORDS} and {DESCRIPTION} beside it"
        yield "adapter", self._adapter()
        yield "memory", self._memory(adapters)

    def _model(self) -> str:
        file = "model.safetensors" if self.options.safe_serialization else "pytorch_model.bin"
        shards = math.ceil(self.nbytes / self._shard_size)
        files = file if shards == 1 else f"about {shards} shards of {file}"
        dtypes = {_DTYPES.get(dtype, dtype.removeprefix("torch.")) for _, dtype in filter(None, self.tensors.values())}
        precision = " and ".join(sorted(dtypes))
        aligned = " before the vocabulary is aligned" if self.planner._tokenizer_task else ""
        changed = f"{len(self.applied)} of {len(self.tensors)} tensors changed"
        return f"{files}, {self.nbytes:,} bytes ({_size(self.nbytes)}){aligned}, {precision}, {changed}"

    def _adapter(self) -> str:
        try:
            file = adapter_task(self.planner, Path()).file
        except InputError as error:
            return f"none can be written: {error.message}"
        rank = max(map(self.rank, file.plans))
        size = sum(rank * sum(plan.modules[0].shape) for plan in file.plans) * _itemsize(file.dtype or "float32")
        most = " at most" if self.extracts or not self.method.result.exact else ""
        where = "adapter/adapter_model.safetensors" if self.wants_adapter else "can be written (adapter: true)"
        return f"{where}, rank {rank}{most}, {size:,} bytes ({_size(size)}){most}"

    @property
    def _shard_size(self) -> int:
        """Of the output; mergekit takes 0 for no limit."""
        return min(size for size in (self.options.out_shard_size, self.nbytes) if size > 0)

    def _memory(self, adapters: list[ReadAdapter]) -> str:
        """An upper estimate of the peak, by what is held at once."""
        index = LoaderCache().get(self.config.base_model).index
        shard = max(os.path.getsize(Path(index.base_path, shard.filename)) for shard in index.shards)
        chunks = {part.update.merge.chunk for task in self.applied.values() for part in task.parts if part.update}
        largest = max((4 * self.tensors[name][0] for name in self.applied if self.tensors[name]), default=0)
        merged = sum(4 * self.rank(plan) * sum(plan.modules[0].shape) for plan in self.plans)
        parts = {
            "mergekit": _IMPORTS,
            "adapters": sum(adapter.nbytes for adapter in adapters),
            "a chunk to merge": max((sum(p.nbytes for p in (*c.plans, *c.pairs)) for c in chunks), default=0),
            "merged updates": merged if self.method.solves or self.wants_adapter else 0,
            "a tensor in float32": (3 if self.extracts or self.method.result.dense else 2) * largest,
            "a shard of the output": self._shard_size,
            "a shard of the base": 0 if index.is_safetensors else shard,
        }
        listed = ", ".join(f"{what} {_size(size)}" for what, size in parts.items() if size)
        mapped = f"; beside it the base's shards of up to {_size(shard)} are mapped" if index.is_safetensors else ""
        return f"about {_size(sum(parts.values()))} at most ({listed}){mapped}"


@dataclass
class Report:
    """All that can be said of one recipe."""

    config: MergeConfiguration
    adapters: list[ReadAdapter] = field(default_factory=list)
    output: Output | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def print(self, console: Console) -> None:
        console.print(f"{self.config.merge_method} on {self.config.base_model}", soft_wrap=True)
        weights = weight_ranges(self.output.plans) if self.output else {}
        norms = [adapter.norm for adapter in self.adapters if adapter.norm]
        names = short_names([adapter.adapter.name for adapter in self.adapters])
        columns = ("kind", "rank", "modules", "dtype", "norm (of the median)", "weight")
        name, base = (Column(header, overflow="fold") for header in ("adapter", "trained on"))
        table = Table(name, *columns, base, show_lines=True)
        for name, adapter in zip(names, self.adapters):
            row = adapter.row(weights.get(adapter.adapter.name, "-"), statistics.median(norms) if norms else 0)
            table.add_row(name, *row)
        if self.adapters:
            console.print(table)
        for label, text in self.output.rows(self.adapters) if self.output else ():
            console.print(f"{label}: {text}", soft_wrap=True)
        for warning in self.warnings:
            console.print(f"Warning: {warning}", soft_wrap=True)


def check(config: MergeConfiguration, options: MergeOptions, stages: set[str]) -> Report:
    """Check the recipe, its base, each of its adapters and, if nothing is wrong with them, the plan.

    Args:
        stages: names of merges whose results do not exist yet
    """
    report, method = Report(config), METHODS[config.merge_method]
    problems = report.problems
    LoaderCache().setup(options=options)
    with _collected(report.warnings):
        problems += dict.fromkeys(fault.message for fault in faults(config, options, stages))
        base = config.base_model
        given = sorted(stages & {model.model.path for model in config.referenced_models()})
        for stage in given:
            report.warnings.append(
                f"{stage} is the result of another stage and taken as given: the plan is not checked"
            )
        staged = base is not None and base.model.path in stages
        unreadable = f"base {base} is not readable as a model"
        found = base and not staged and attempt(problems, unreadable, lambda: _open_base(base, options))
        for reference in dict.fromkeys(source.model for source in sources(config)):
            if reference.lora or (found and isinstance(reference, FullModelReference)):
                name = reference.lora or reference.model
                read = attempt(problems, name, lambda: ReadAdapter.of(reference, bool(found)))  # noqa: B023
                report.adapters += [read] if read else []
        for adapter in report.adapters:
            report.warnings += adapter.warnings(method, None if staged else base)
        if found and not problems and not given:
            report.output = attempt(problems, config.merge_method, lambda: _plan(config, options))
        if report.output:
            report.warnings += report.output.warnings()
    return report


def _open_base(base: ModelReference, options: MergeOptions) -> bool:
    base.config(options.trust_remote_code)
    return bool(Checkpoint(LoaderCache().get(base).index.base_path).headers)


def _plan(config: MergeConfiguration, options: MergeOptions) -> Output:
    planner = make_planner(config, options)
    planner.plan_to_disk(os.devnull)  # where no earlier merge lies
    return Output(planner)


def attempt(problems: list[str], what: Any, call: Callable[[], T]) -> T | None:
    """The result, or None and one sentence per problem."""
    try:
        return call()
    except InputError as error:
        problems.append(error.message)
    except ValidationError as error:
        problems += [f"{what}: {'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']}" for e in error.errors()]
    except Exception as error:  # mergekit, transformers and the hub raise a dozen unrelated types
        problems.append(f"{what}: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
    return None


@contextmanager
def _collected(warnings: list[str]) -> Iterator[None]:
    """Warnings that are logged become part of the report."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def _last(path: str) -> str:
    return os.path.basename(os.path.realpath(path) if os.path.exists(path) else path.rstrip("/")).lower()


def _itemsize(dtype: str) -> int:
    """Bytes of a value, of a dtype as mergekit, safetensors or torch spell it."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 1


def _size(nbytes: int) -> str:
    unit, name = next(((2**n, name) for n, name in ((30, "GiB"), (20, "MiB")) if nbytes >= 2**n), (2**10, "KiB"))
    return f"{nbytes / unit:.1f} {name}"


def read_documents(file: Path) -> list[dict]:
    try:
        documents = list(yaml.safe_load_all(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{file}: not readable as YAML ({error})") from error
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise InputError(f"{file}: holds no recipe, which is a mapping with merge_method and models")
    return documents
