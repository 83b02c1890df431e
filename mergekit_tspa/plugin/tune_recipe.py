"""Search from a recipe to a recipe."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mergekit_tspa.calibration.readings import TextSource
from mergekit_tspa.errors import InputError
from mergekit_tspa.merging.plan import MergePlan
from mergekit_tspa.methods import METHODS
from mergekit_tspa.methods.inputs import PER_MODEL, Progress
from mergekit_tspa.plugin.compat import MergeOptions, ModelReference
from mergekit_tspa.plugin.merge_method import ADAPTER_PARAMETERS, TEXTS
from mergekit_tspa.plugin.planning import PlannedRecipe
from mergekit_tspa.plugin.recipe import sources
from mergekit_tspa.plugin.recipe_file import read_documents, read_recipe
from mergekit_tspa.plugin.references import AdapterReference, adapter_loader, base_loader
from mergekit_tspa.plugin.score_recipes import judging_texts, planned_recipe, recipe_judge
from mergekit_tspa.scoring.candidates import check_unmoved
from mergekit_tspa.scoring.judge import Judge
from mergekit_tspa.tuning.problem import Problem, Split
from mergekit_tspa.tuning.search_space import tidy
from mergekit_tspa.tuning.searches import Bench, Search, check_problem, search
from mergekit_tspa.tuning.study import check_storage
from mergekit_tspa.tuning.tuner import Tuned
from mergekit_tspa.tuning.workbench import Spec, with_rank


class Tuning(NamedTuple):
    """A search that is over, and what it was judged by."""

    found: Tuned
    judge: Judge
    split: Split
    base: str
    recipe: str  # that was found, as text


def tune_recipe(
    file: Path,
    options: MergeOptions,
    held_out: Mapping[str, str],
    general: str | None,
    problem: Problem,
    minutes: float,
    storage: Path,
    ray: str | None,
    progress: Progress,
) -> Tuning:
    """Search for the best merge of a recipe's adapters.

    Args:
        file: of the recipe, whose method and parameters are only where the search begins
        held_out: texts to judge by, which go before those of the recipe
        general: a file of texts that no adapter was trained on
        problem: what is searched for
        minutes: for the search
        storage: of the trials
        ray: None tries here; an address, or an empty string, on a Ray cluster

    Raises:
        InputError: input that is not readable or cannot be merged, no trial with a result.
    """
    check_storage(storage)
    document = _document(file)
    recipe = planned_recipe(file, options)
    check_unmoved(recipe.merge)
    texts = judging_texts({str(file): recipe}, held_out)
    judge = recipe_judge(recipe, texts, options, general, 0, progress)
    check_problem(problem, judge)
    judging = {adapter.name for adapter, source in texts.items() if source.part == "to judge"}
    examples = {
        adapter.name: TextSource(source.examples, part="to merge" if adapter.name in judging else "all")
        for adapter, source in recipe.texts.items()
        if source.examples is not None
    }
    if len(examples) < len(recipe.texts):
        examples = {}  # methods that look at texts need some of every adapter
    directory = Path(base_loader(recipe.config).index.base_path)
    device = options.device or "cpu"
    cpus = options.num_threads or 1
    bench = Bench(partial(_merge_of, file, options), directory, examples, problem.rank, device)
    how = Search(problem, minutes, storage, start_of(recipe), ray, cpus)
    searched = search(bench, judge, how, progress)
    base = str(recipe.config.base_model)
    return Tuning(*searched, base, written_recipe(document, recipe, searched.found.best, problem))


def _merge_of(file: Path, options: MergeOptions) -> MergePlan:
    """On whatever worker."""
    return planned_recipe(file, options).merge


def _document(file: Path) -> dict[str, Any]:
    """The recipe as its author wrote it.

    Raises:
        InputError: it has slices or modules, whose layout the result could not keep.
    """
    read_recipe(file)
    (document,) = read_documents(file)
    if "models" not in document:
        raise InputError(f"{file}: a search needs a recipe with `models:`; write the adapters there")
    return document


def start_of(recipe: PlannedRecipe) -> Spec:
    """The recipe's own merge, as far as it has one set of parameters and one weight for each adapter."""
    weights = {name: own.pop() for name, own in recipe.merge.weights_of().items() if len(own) == 1}
    tensors = recipe.merge.tensors
    method = recipe.merge.method
    if not tensors or method.guided:
        return Spec("core_tsv")
    own = tensors[0].parameters
    fields = method.parameter_fields()
    values = {name: getattr(own, "lambda_" if name == "lambda" else name) for name in fields}
    changed = {
        name: value for name, value in values.items() if value != fields[name].default and name != "rank"
    }
    return Spec(method.name, changed, {name: weight for name, weight in weights.items() if weight != 1})


def written_recipe(document: Mapping[str, Any], recipe: PlannedRecipe, best: Spec, problem: Problem) -> str:
    """The recipe that was found: the author's, with another method, other parameters and weights."""
    kept = {
        key: value for key, value in document.items() if key not in ("merge_method", "models", "parameters")
    }
    method = METHODS[best.method]
    parameters = dict(with_rank(recipe.merge, method, dict(tidy(best.parameters)), problem.rank))
    # Of the adapters and the output, not of the method.
    for name in (*ADAPTER_PARAMETERS, *PER_MODEL, *(spec.name for spec in TEXTS)):
        if name in (document.get("parameters") or {}):
            parameters[name] = document["parameters"][name]
    models, weights = [], dict(tidy(best.weights))
    # In the order of the recipe; an entry that is the base itself stays as it is.
    references = [
        source.model for source in sources(recipe.config) if isinstance(source.model, AdapterReference)
    ]
    names = [adapter_loader(reference).adapter.name for reference in dict.fromkeys(references)]
    base = str(recipe.config.base_model)
    for given in document["models"]:
        model = dict(given)
        if str(ModelReference.model_validate(given["model"])) != base:
            name = names.pop(0)
            model["parameters"] = dict(given.get("parameters") or {}) | {"weight": weights.get(name, 1.0)}
        models.append(model)
    found = {"merge_method": best.method, **kept, "models": models}
    found |= {"parameters": parameters} if parameters else {}
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)
