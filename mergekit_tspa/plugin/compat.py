"""Everything that this package takes from mergekit, and whether the installed mergekit has it.

No other file of the package imports mergekit, and most of what is used of it is private or undocumented.
`NEEDED` lists each name with the parameters and attributes that this package relies on.  A name is looked at
as soon as its module is imported (`look`), and all of them before the first merge by one of our methods
(`look_everywhere`).  The hooks stay out of a mergekit that does not fit, so its own merges run as if this
package were not installed.

The names themselves are imported when they are asked for, because the first hook runs while mergekit is half
imported; elsewhere they look like any other name of this module:

    from mergekit_tspa.plugin.compat import LoaderCache
"""

import functools
import inspect
import queue
import sys
import threading
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from mergekit_tspa.errors import InputError

if TYPE_CHECKING:
    from mergekit.architecture import ModelArchitecture as ModelArchitecture
    from mergekit.architecture import ModuleDefinition as ModuleDefinition
    from mergekit.architecture import WeightInfo as WeightInfo
    from mergekit.architecture.conversion import can_convert_checkpoint_keys as can_convert_checkpoint_keys
    from mergekit.architecture.json_definitions import JsonLayerTemplates as JsonLayerTemplates
    from mergekit.architecture.json_definitions import JsonModuleArchDef as JsonModuleArchDef
    from mergekit.architecture.json_definitions import JsonModuleArchitecture as JsonModuleArchitecture
    from mergekit.card import CARD_TEMPLATE as CARD_TEMPLATE
    from mergekit.common import ModelPath as ModelPath
    from mergekit.common import ModelReference as ModelReference
    from mergekit.common import dtype_from_name as dtype_from_name
    from mergekit.common import get_auto_cls as get_auto_cls
    from mergekit.config import ConditionalParameter as ConditionalParameter
    from mergekit.config import InputModelDefinition as InputModelDefinition
    from mergekit.config import InputSliceDefinition as InputSliceDefinition
    from mergekit.config import MergeConfiguration as MergeConfiguration
    from mergekit.config import OutputModuleDefinition as OutputModuleDefinition
    from mergekit.config import OutputSliceDefinition as OutputSliceDefinition
    from mergekit.graph import Executor as Executor
    from mergekit.graph import Task as Task
    from mergekit.io.lazy_tensor_loader import LazyTensorLoader as LazyTensorLoader
    from mergekit.io.lazy_tensor_loader import ShardedTensorIndex as ShardedTensorIndex
    from mergekit.io.tasks import FinalizeModel as FinalizeModel
    from mergekit.io.tasks import GatherTensors as GatherTensors
    from mergekit.io.tasks import LoaderCache as LoaderCache
    from mergekit.io.tasks import LoadTensor as LoadTensor
    from mergekit.io.tasks import TensorWriterTask as TensorWriterTask
    from mergekit.io.tensor_writer import TensorWriter as TensorWriter
    from mergekit.merge_methods.base import BasePolicy as BasePolicy
    from mergekit.merge_methods.base import GroupMergeMethod as GroupMergeMethod
    from mergekit.merge_methods.base import InputContract as InputContract
    from mergekit.merge_methods.base import MergeMethod as MergeMethod
    from mergekit.merge_methods.base import MergeMethodSpec as MergeMethodSpec
    from mergekit.merge_methods.base import ParameterScope as ParameterScope
    from mergekit.merge_methods.base import ParameterSpec as ParameterSpec
    from mergekit.merge_methods.base import TensorEntry as TensorEntry
    from mergekit.merge_methods.base import TensorGroup as TensorGroup
    from mergekit.merge_methods.base import TensorMetadata as TensorMetadata
    from mergekit.merge_methods.registry import register as register
    from mergekit.merge_methods.registry import registered_methods as registered_methods
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask as ExecuteMergeMethodTask
    from mergekit.multigpu_executor import MultiGPUExecutor as MultiGPUExecutor
    from mergekit.options import MergeOptions as MergeOptions
    from mergekit.options import add_merge_options as add_merge_options
    from mergekit.plan import MergePlanner as MergePlanner

TESTED = ("0.1.5",)  # versions of mergekit that the tests of this package pass with


@dataclass(frozen=True, eq=False)
class Needed:
    """A name of mergekit, and what this package relies on."""

    module: str
    name: str  # `Class.method` for a method
    takes: str | None = None  # parameters that are given; all others must have defaults
    has: str = ""  # fields, annotated attributes and methods of a class
    exact: bool = False  # a function of ours stands in its place, so `takes` are all its parameters
    calls: str = ""  # names that its body uses, because hooks act there
    test: Callable[[Any], bool] | None = None  # of a constant

    def find(self) -> Any:
        """The object itself.

        Raises:
            ImportError: there is no such module.
            AttributeError: its module or class has no such name.
        """
        value = import_module(self.module)
        for part in self.name.split("."):
            value = getattr(value, part)
        return value

    def missing(self) -> list[str]:
        """Full names of what mergekit lacks or has in another form; empty where it fits."""
        name = f"{self.module}.{self.name}"
        try:
            value = self.find()
            if not (
                self._takes_parameters(value)
                and self._calls(value)
                and (self.test is None or self.test(value))
            ):
                return [name]
            attributes = _attributes(value) if self.has else set()
        except Exception:  # whatever goes wrong with a name that changed, it is not what is needed
            return [name]
        return [f"{name}.{attribute}" for attribute in self.has.split() if attribute not in attributes]

    def _takes_parameters(self, function: Any) -> bool:
        if self.takes is None:
            return True
        parameters = dict(inspect.signature(function).parameters)
        parameters.pop("self", None)
        if self.exact:
            return list(parameters) == self.takes.split()
        given = set(self.takes.split())
        required = {
            name
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        }
        return required <= given <= parameters.keys()

    def _calls(self, function: Any) -> bool:
        return not self.calls or set(self.calls.split()) <= set(inspect.unwrap(function).__code__.co_names)


def _attributes(kind: type) -> set[str]:
    """Methods, fields and annotated attributes of a class; its instances may have more."""
    annotated = (name for base in kind.__mro__ for name in inspect.get_annotations(base))
    return {*dir(kind), *annotated}


def _is_mapping(value: Any) -> bool:
    return isinstance(value, MutableMapping)


def _is_hooked_planner(planner: Any) -> bool:
    """Whether `run_merge` plans with the class whose methods are hooked."""
    return planner is EXPORTS["MergePlanner"].find()


def _has_places(template: str) -> bool:
    places = ("metadata", "name", "merge_method", "base_text", "model_list", "config_yaml")
    return all(f"{{{place}}}" in template for place in places)


# Classes and functions that the package imports from here, and the methods that it calls or overrides.
TAKEN = (
    Needed("mergekit.architecture", "ModelArchitecture", "modules architectures model_type", "modules"),
    Needed("mergekit.architecture", "ModelArchitecture.all_weights", "config"),
    Needed("mergekit.architecture", "ModuleDefinition", "architecture", "architecture"),
    Needed("mergekit.architecture", "WeightInfo", "name optional force_dtype", "aliases tied_names"),
    Needed(
        "mergekit.architecture.conversion", "can_convert_checkpoint_keys", "model_type source_keys target_key"
    ),
    Needed("mergekit.architecture.json_definitions", "JsonLayerTemplates", "weights"),
    Needed(
        "mergekit.architecture.json_definitions",
        "JsonModuleArchDef",
        "model_type architectures pre_weights layer_templates post_weights override_num_layers",
    ),
    Needed("mergekit.architecture.json_definitions", "JsonModuleArchitecture", "definition"),
    Needed("mergekit.architecture.json_definitions", "JsonModuleArchitecture.num_layers", "config"),
    Needed("mergekit.card", "CARD_TEMPLATE", test=_has_places),
    Needed("mergekit.common", "ModelPath", "path revision", "path revision"),
    Needed(
        "mergekit.common",
        "ModelReference",
        "model lora override_architecture",
        "model lora override_architecture",
    ),
    Needed("mergekit.common", "ModelReference.config", "trust_remote_code"),
    Needed("mergekit.common", "ModelReference.lazy_loader", "cache_dir lazy_unpickle", exact=True),
    Needed("mergekit.common", "ModelReference.local_path", "cache_dir ignore_lora", exact=True),
    Needed(
        "mergekit.common", "ModelReference.merged", "cache_dir trust_remote_code lora_merge_dtype", exact=True
    ),
    Needed("mergekit.common", "ModelReference.parse", "value"),
    Needed("mergekit.common", "ModelReference.tensor_index", "cache_dir"),
    Needed("mergekit.common", "dtype_from_name", "name"),
    Needed("mergekit.common", "get_auto_cls", "arch_name"),
    Needed("mergekit.config", "ConditionalParameter", has="filter value"),
    Needed("mergekit.config", "InputModelDefinition", "model parameters", "model parameters"),
    Needed("mergekit.config", "InputSliceDefinition", "model layer_range", "model layer_range parameters"),
    Needed(
        "mergekit.config",
        "MergeConfiguration",
        "merge_method",
        "base_model dtype merge_method models modules out_dtype parameters referenced_models slices to_yaml "
        "tokenizer tokenizer_source",
    ),
    Needed("mergekit.config", "OutputModuleDefinition", "models", "models parameters slices"),
    Needed("mergekit.config", "OutputSliceDefinition", "sources", "base_model parameters sources"),
    Needed("mergekit.graph", "Executor", "targets math_device storage_device"),
    Needed("mergekit.graph", "Executor.run", "quiet"),
    Needed(
        "mergekit.graph",
        "Task",
        "",
        "arguments execute group_label main_thread_only priority uses_accelerator",
    ),
    Needed("mergekit.io.lazy_tensor_loader", "LazyTensorLoader", "index lazy_unpickle", "index"),
    Needed("mergekit.io.lazy_tensor_loader", "LazyTensorLoader.get_tensor", "key device"),
    Needed("mergekit.io.lazy_tensor_loader", "ShardedTensorIndex", has="base_path tensor_paths"),
    Needed("mergekit.io.lazy_tensor_loader", "ShardedTensorIndex.from_disk", "base_path"),
    Needed("mergekit.io.tasks", "FinalizeModel"),
    Needed("mergekit.io.tasks", "GatherTensors", has="device dtype weight_info"),
    Needed(
        "mergekit.io.tasks",
        "LoadTensor",
        "model tensor dtype device optional aliases tied_names",
        "execute group_label tensor",
    ),
    Needed("mergekit.io.tasks", "LoaderCache", "", "hf_cache_dir trust_remote_code"),
    Needed("mergekit.io.tasks", "LoaderCache.get", "model"),
    Needed("mergekit.io.tasks", "LoaderCache.setup", "options"),
    Needed("mergekit.io.tasks", "TensorWriterTask", "out_path max_shard_size override_basename"),
    Needed("mergekit.io.tensor_writer", "TensorWriter", "out_path", "__enter__ __exit__ finalize out_path"),
    Needed("mergekit.io.tensor_writer", "TensorWriter.save_tensor", "name tensor clone"),
    Needed("mergekit.merge_methods.base", "BasePolicy", has="REQUIRED"),
    Needed("mergekit.merge_methods.base", "GroupMergeMethod"),
    Needed("mergekit.merge_methods.base", "GroupMergeMethod.merge_group", "group parameters", exact=True),
    Needed("mergekit.merge_methods.base", "InputContract", "base"),
    Needed("mergekit.merge_methods.base", "MergeMethod", has="spec"),
    Needed(
        "mergekit.merge_methods.base",
        "MergeMethodSpec",
        "name parameters contract pretty_name reference_url",
        "name parameters",
    ),
    Needed("mergekit.merge_methods.base", "ParameterScope", has="INPUT NON_BASE SHARED"),
    Needed(
        "mergekit.merge_methods.base",
        "ParameterSpec",
        "name value_type scope default description",
        "default name",
    ),
    Needed("mergekit.merge_methods.base", "ParameterSpec.validate", "value"),
    Needed("mergekit.merge_methods.base", "TensorEntry", has="id tensor"),
    Needed("mergekit.merge_methods.base", "TensorGroup", has="base metadata non_base"),
    Needed("mergekit.merge_methods.base", "TensorMetadata", has="name"),
    Needed("mergekit.merge_methods.registry", "register", "method"),
    Needed("mergekit.merge_methods.registry", "registered_methods", ""),
    Needed(
        "mergekit.merge_methods.task_adapter",
        "ExecuteMergeMethodTask",
        has="base_model gather_tensors input_parameters model_order parameters",
    ),
    Needed("mergekit.multigpu_executor", "MultiGPUExecutor", "targets storage_device"),
    Needed(
        "mergekit.options",
        "MergeOptions",
        "",
        "apply_global_options device multi_gpu num_threads out_shard_size quiet random_seed "
        "safe_serialization transformers_cache trust_remote_code unsafe_truncate_embeddings",
    ),
    Needed("mergekit.options", "add_merge_options", "f"),
    Needed("mergekit.plan", "MergePlanner", "config arch_info options out_model_config", "config options"),
)
EXPORTS = {needed.name: needed for needed in TAKEN if "." not in needed.name}

# What the functions at the end of this file read.
ACCELERATOR_COUNT = Needed("mergekit.common", "get_torch_accelerator_count", "")
RESOLVE_NAME = Needed("mergekit.io.tasks", "LoadTensor._resolve_name", "loader")
REGISTERED = Needed("mergekit.merge_methods.registry", "_METHODS", test=_is_mapping)
PLANNED = Needed("mergekit.plan", "MergePlanner", has="_tensors _tokenizer_task")
READ = (ACCELERATOR_COUNT, RESOLVE_NAME, REGISTERED, PLANNED)

# What holds models, parts before wholes: pydantic copies how a part is read and written into the whole.
HOLD_MODELS = (
    *(
        Needed("mergekit.tokenizer.config", name, has=has)
        for name, has in (
            ("ModelTokenEmbedding", "model"),
            ("TokenEmbeddingConfig", "source"),
            ("TokenizerConfig", "source"),
        )
    ),
    EXPORTS["InputSliceDefinition"],
    EXPORTS["InputModelDefinition"],
    EXPORTS["OutputSliceDefinition"],
    EXPORTS["OutputModuleDefinition"],
    EXPORTS["MergeConfiguration"],
)

# What the hooks surround.
GENERATE_CARD = Needed("mergekit.merge", "generate_card", "config config_yaml name", exact=True)
GET_ARCHITECTURE_INFO = Needed("mergekit.merge", "get_architecture_info", "config options", exact=True)
MODEL_OUT_CONFIG = Needed(
    "mergekit.merge", "_model_out_config", "config arch_info trust_remote_code", exact=True
)
RUN_MERGE = Needed(
    "mergekit.merge",
    "run_merge",
    "merge_config out_path options config_source",
    exact=True,
    calls="MergePlanner _model_out_config generate_card get_architecture_info plan_to_disk",
)
RUN_MERGE_PLANNER = Needed("mergekit.merge", "MergePlanner", test=_is_hooked_planner)
PLAN = Needed("mergekit.plan", "MergePlanner._plan", "", exact=True)
PLAN_IN_MEMORY = Needed(
    "mergekit.plan", "MergePlanner.plan_in_memory", "", exact=True, calls="_plan _tensors"
)
PLAN_TO_DISK = Needed(
    "mergekit.plan", "MergePlanner.plan_to_disk", "out_path", exact=True, calls="_plan _tensors"
)
WORK_PARALLEL = Needed(
    "mergekit.multigpu_executor",
    "MultiGPUExecutor._device_worker",
    "task_list cached_values device quiet",
    calls="task_completion_queue",
)
RUN_PARALLEL = Needed(
    "mergekit.multigpu_executor",
    "MultiGPUExecutor.run",
    "quiet",
    exact=True,
    calls="done_event",
)
HOOKED = (
    *(GENERATE_CARD, GET_ARCHITECTURE_INFO, MODEL_OUT_CONFIG, RUN_MERGE, RUN_MERGE_PLANNER),
    *(PLAN, PLAN_IN_MEMORY, PLAN_TO_DISK, WORK_PARALLEL, RUN_PARALLEL),
)

# mergekit-evolve's module is looked at only where a program imports it.
GENOME_PARAMETERS = Needed("mergekit.evo.genome", "METHOD_PARAM_MAPS", test=_is_mapping)
GENOME_NORMALIZE = Needed("mergekit.evo.genome", "ModelGenomeDefinition", has="normalize")
GENOME_CONFIG = Needed("mergekit.evo.genome", "ModelGenome.genotype_merge_config", "genotype", exact=True)
GENOME = (GENOME_PARAMETERS, GENOME_NORMALIZE, GENOME_CONFIG)

NEEDED = (*TAKEN, *READ, *HOLD_MODELS[:3], *HOOKED, *GENOME)

# Stock commands that `mergekit-tspa` offers with our methods loaded; looked at when one is asked for.
STOCK_COMMANDS = {
    "yaml": Needed("mergekit.scripts.run_yaml", "main"),
    "multi": Needed("mergekit.scripts.multimerge", "main"),
}

_unseen = dict.fromkeys(NEEDED)  # not looked at yet
_missing: list[str] = []


def look(executed: str = "") -> bool:
    """Look at the needed names of all modules imported by now, and say whether everything seen so far fits.

    Args:
        executed: a module that is complete although its import has not returned yet
    """
    _look([needed for needed in [*_unseen] if _is_whole(needed.module, executed)])
    return not _missing


def look_everywhere() -> bool:
    """Import what is needed of mergekit, and say whether all of it fits."""
    _look([needed for needed in _unseen if needed not in GENOME or needed.module in sys.modules])
    return not _missing


def require() -> None:
    """
    Raises:
        InputError: mergekit does not fit; the message is that of `sentence`.
    """
    if not look_everywhere():
        raise InputError(sentence(_missing))


def sentence(missing: list[str] | None = None) -> str:
    """What is said of a mergekit that does not fit, by default of what `look` found missing."""
    first, *more = _missing if missing is None else missing
    what = f"{first} is missing or has another signature"
    if more:
        what += f" (and {len(more)} more)"
    try:
        found = version("mergekit")
    except PackageNotFoundError:
        found = "of unknown version"
    return (
        f"mergekit {found} does not fit: {what}; mergekit_tspa was tested with {', '.join(TESTED)}, so its "
        "methods are left out, and merges by mergekit's own methods are not affected"
    )


def _look(chosen: list[Needed]) -> None:
    for needed in chosen:
        if needed in _unseen:  # the first use of a module may run its hook, which looks as well
            del _unseen[needed]
            _missing.extend(needed.missing())


def _is_whole(name: str, executed: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and (name == executed or not getattr(module.__spec__, "_initializing", False))


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A class or function of mergekit, imported when it is first asked for.

        Raises:
            InputError: mergekit has none of that name any more.
        """
        if name not in EXPORTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return EXPORTS[name].find()
        except (ImportError, AttributeError) as error:
            raise InputError(sentence([f"{EXPORTS[name].module}.{name}"])) from error


def respell(
    read_path: Callable[[Any], Any],
    read_reference: Callable[[Any], Any],
    written: Callable[..., Any],
    refuse: Callable[[Any, Exception], None],
) -> None:
    """Let functions of ours read models from recipes and write them, in everything that has models.

    Args:
        refuse: hears of a recipe that cannot be read, and why; it may raise what is not a `ValueError`
    """
    path, reference = EXPORTS["ModelPath"].find(), EXPORTS["ModelReference"].find()

    def reads_as(kept: Any) -> Callable[[str], bool]:
        def reads(text: str) -> bool:
            return bool(reference.model_validate(text).__dict__ == kept.__dict__)

        return reads

    def write(kept: Any) -> Any:
        return written(kept.model, kept.lora, kept.override_architecture, reads_as(kept))

    def extend_schema(kind: type, read: Callable[[Any], Any], serialization: Any) -> None:
        def core(cls: type, source: Any, handler: Any) -> Any:
            schema = handler(source)
            schema["schema"] = {
                "type": "function-before",
                "function": {"type": "no-info", "function": read},
                "schema": schema["schema"],
            }
            return schema | ({"serialization": serialization} if serialization else {})

        kind.__get_pydantic_core_schema__ = classmethod(core)  # type: ignore[attr-defined]

    def read_recipe(recipe: Any, read: Callable[[Any], Any]) -> Any:
        try:
            return read(recipe)
        except (ValueError, RuntimeError) as error:
            refuse(recipe, error)
            raise

    def refusing(cls: type, source: Any, handler: Any) -> Any:
        function = {"type": "no-info", "function": read_recipe}
        return {"type": "function-wrap", "function": function, "schema": handler(source)}

    whole: Any = EXPORTS["MergeConfiguration"].find()
    whole.__get_pydantic_core_schema__ = classmethod(refusing)
    extend_schema(path, read_path, None)
    extend_schema(reference, read_reference, {"type": "function-plain", "function": write})
    for needed in (EXPORTS["ModelPath"], EXPORTS["ModelReference"], *HOLD_MODELS):
        needed.find().model_rebuild(force=True)


def import_methods() -> None:
    """Import mergekit's own merge methods; the registry's hook then registers ours."""
    with suppress(ModuleNotFoundError):  # which `look_everywhere` says in words
        import_module("mergekit.merge_methods")


def surround(needed: Needed, hook: Callable[..., Any]) -> None:
    """Put `hook(original, *args, **kwargs)` in the place of a function or method of mergekit."""
    original = needed.find()

    @functools.wraps(original)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    owner, _, name = needed.name.rpartition(".")
    place = import_module(needed.module)
    setattr(getattr(place, owner) if owner else place, name, hooked)


def unregister(method: "MergeMethod") -> None:
    """Take a method out of mergekit's registry; nothing happens if another one has its name."""
    methods = REGISTERED.find()
    if methods.get(method.spec.name) is method:
        del methods[method.spec.name]


def plan(planner: "MergePlanner") -> None:
    """Plan all tensors of a merge, by our tasks where its method is one of ours."""
    planner._plan()


def planned_tensors(planner: "MergePlanner") -> "list[tuple[WeightInfo, Task]]":
    """The output's tensors and their tasks, in mergekit's own list: what is put in changes the plan."""
    return planner._tensors


def keep_all_results(executor: "MultiGPUExecutor") -> None:
    """Let the thread that collects the results of `--multi-gpu` stop only when it has collected all.

    mergekit's stops as soon as the devices are done.  Results that are still queued then are lost, and the
    merge ends in "No value for required tensor".
    """
    executor.done_event = _Drained(executor.task_completion_queue)


class _Drained(threading.Event):
    """An event that counts as set only when the queue is empty."""

    def __init__(self, queue: "queue.Queue[Any]") -> None:
        super().__init__()
        self._queue = queue

    def is_set(self) -> bool:
        return super().is_set() and self._queue.empty()


def aligns_vocabulary(planner: "MergePlanner") -> bool:
    """Whether the recipe has tokenizer options, so that tensors along the vocabulary are resized."""
    return planner._tokenizer_task is not None


def stored_name(load: "LoadTensor", loader: "LazyTensorLoader") -> str | None:
    """Under which of its names the checkpoint has a tensor; None if mergekit converts it from others."""
    return load._resolve_name(loader)


def get_architecture_info(config: "MergeConfiguration", options: "MergeOptions") -> "ModelArchitecture":
    """The architecture of a merge as `run_merge` gets it, through our hook."""
    return GET_ARCHITECTURE_INFO.find()(config, options)


def run_merge(config: "MergeConfiguration", out_path: str, options: "MergeOptions", source: str) -> None:
    """Merge to a model as `mergekit-yaml` does, through our hook.

    Args:
        source: the recipe as its author wrote it
    """
    RUN_MERGE.find()(config, out_path, options, source)


def accelerator_count() -> int:
    """How many accelerators `--multi-gpu` would use."""
    with suppress(AttributeError):  # of None, which torch calls the accelerator of a machine without one
        return ACCELERATOR_COUNT.find()()
    return 0


def genome_parameters() -> MutableMapping[str, list[str]]:
    """Which parameters mergekit-evolve searches, by method; what is put in counts."""
    return GENOME_PARAMETERS.find()


def stock_command(name: str) -> Any:
    """One of `STOCK_COMMANDS`, a click command.

    Raises:
        InputError: mergekit has it no more.
    """
    needed = STOCK_COMMANDS[name]
    if missing := needed.missing():
        raise InputError(sentence(missing))
    return needed.find()
