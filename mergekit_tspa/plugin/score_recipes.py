"""Recipes, and merges on disk, judged side by side."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mergekit_tspa.adapters import Adapter
from mergekit_tspa.calibration.readings import SELF, Reading, Readings, TextSource
from mergekit_tspa.errors import InputError, nearest
from mergekit_tspa.insight.inspection import short_names
from mergekit_tspa.merging.plan import MergePlan, Variation
from mergekit_tspa.methods import METHODS
from mergekit_tspa.methods.inputs import Progress
from mergekit_tspa.plugin.adapter_output import make_planner
from mergekit_tspa.plugin.compat import MergeOptions, plan
from mergekit_tspa.plugin.planning import PlannedRecipe, merge_of
from mergekit_tspa.plugin.recipe_file import read_recipe
from mergekit_tspa.plugin.references import base_loader
from mergekit_tspa.scoring.candidates import check_unmoved, planned, stored
from mergekit_tspa.scoring.judge import Judge
from mergekit_tspa.scoring.score_report import SUM, ScoreReport
from mergekit_tspa.scoring.scores import described, judge_of, score_all

Texts = Mapping[str, str]  # files by the name of an adapter


def score_recipes(
    inputs: Sequence[str],
    options: MergeOptions,
    held_out: Texts,
    general: str | None,
    new_tokens: int,
    progress: Progress,
) -> ScoreReport:
    """Judge recipes of one base and the same adapters, and adapters or models on disk.

    Args:
        inputs: files of recipes, at least one, and directories
        held_out: texts to judge by, which go before those of the recipes
        general: a file of texts that no adapter was trained on
        new_tokens: an answer to a text with an `answer` has at most so many

    Raises:
        InputError: recipes of different bases or adapters, an adapter without texts, input that is not
            readable.
    """
    files = [given for given in inputs if not os.path.isdir(given)]
    if not files:
        raise InputError("give at least one recipe, which says what the base and the adapters are")
    recipes = {file: planned_recipe(Path(file), options) for file in files}
    first = next(iter(recipes.values()))
    for file, other in recipes.items():
        check_unmoved(other.merge)
        if str(other.config.base_model) != str(first.config.base_model):
            raise InputError(
                f"{file}: its base is {other.config.base_model}, the first recipe's another; score them apart"
            )
        if {a.name for a in other.texts} != {a.name for a in first.texts}:
            raise InputError(f"{file}: it merges other adapters than the first recipe; score them apart")
    texts = judging_texts(recipes, held_out)
    judge = recipe_judge(first, texts, options, general, new_tokens, progress)
    notes = []
    if any(source.part == "to judge" for source in texts.values()):
        notes.append(
            "A third of the examples judges, and methods that look at texts were given the rest; the merge "
            "that a recipe makes is given all."
        )
    if any(source.examples == SELF for source in texts.values()):
        notes.append(
            "Some adapters wrote the texts that judge them; give held_out texts, and the figures say more."
        )
    device, base = options.device or "cpu", Path(base_loader(first.config).index.base_path)
    paths = [given if os.path.isdir(given) else os.path.splitext(given)[0] for given in inputs]
    candidates = [planned(SUM, SUM, plain_sum(first.merge), device, progress)]
    for given, name in zip(inputs, short_names(paths)):
        if os.path.isdir(given):
            candidates.append(stored(name, Path(given), base))
        else:
            merge = with_model(recipes[given], judge, texts)
            candidates.append(planned(name, "recipe", merge, device, progress))
    return score_all(judge, candidates, str(first.config.base_model), described(texts), notes)


def planned_recipe(file: Path, options: MergeOptions) -> PlannedRecipe:
    """A recipe as mergekit resolves it.

    Raises:
        InputError: it cannot be read or planned.
    """
    config, _ = read_recipe(file)
    planner = make_planner(config, options)
    plan(planner)
    return merge_of(planner).recipe


def judging_texts(recipes: Mapping[str, PlannedRecipe], held_out: Texts) -> dict[Adapter, TextSource]:
    """Which texts judge: those of the command, or `held_out` of a recipe, or a third of its `examples`.

    Raises:
        InputError: there are none for an adapter, two recipes name different ones, or a name is no adapter's.
    """
    adapters = [*next(iter(recipes.values())).texts]
    given = named_texts(held_out, adapters)
    short = dict(zip(adapters, short_names([adapter.name for adapter in adapters])))
    found = {}
    for adapter in adapters:
        own = [
            recipe.texts[one]
            for recipe in recipes.values()
            for one in recipe.texts
            if one.name == adapter.name
        ]
        files = {str(source.held_out): None for source in own if source.held_out}
        examples = {str(source.examples): None for source in own if source.examples}
        for kind, several in (("held_out", files), ("examples", {} if files else examples)):
            if len(several) > 1 and adapter not in given:
                raise InputError(
                    f"{adapter.name}: the recipes name different {kind} ({', '.join(several)}); name the "
                    "texts to judge by with --held-out"
                )
        if adapter in given:
            found[adapter] = TextSource(given[adapter])
        elif files:
            found[adapter] = TextSource(next(iter(files)))
        elif examples:
            found[adapter] = TextSource(next(iter(examples)), part="to judge")
        else:
            raise InputError(
                f"{adapter.name}: there are no texts to judge merges by; give held_out: FILE.jsonl beside "
                f"its weight, or --held-out {short[adapter]}=FILE.jsonl"
            )
        file = found[adapter].examples
        if file != SELF and not os.path.isfile(str(file)):
            raise InputError(f"{file}: there is no such file, which {adapter.name} is given")
    return found


def named_texts(given: Texts, adapters: Sequence[Adapter]) -> dict[Adapter, str]:
    """Files by adapter, where an adapter is named by its path or by the last parts of it.

    Raises:
        InputError: a name is that of no adapter.
    """
    names = dict(zip(short_names([adapter.name for adapter in adapters]), adapters))
    names |= {adapter.name: adapter for adapter in adapters}
    for name in given:
        if name not in names:
            near = nearest(name, names)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise InputError(f"{name}: there is no adapter of this name; {hint}")
    return {names[name]: os.path.expanduser(file) for name, file in given.items()}


def recipe_judge(
    recipe: PlannedRecipe,
    texts: Mapping[Adapter, TextSource],
    options: MergeOptions,
    general: str | None,
    new_tokens: int,
    progress: Progress,
) -> Judge:
    """The base of a recipe with the texts that judge."""
    directory = Path(base_loader(recipe.config).index.base_path)
    device = options.device or "cpu"
    readings = Readings(recipe.base, directory, texts, Reading(), device, progress)
    with torch.no_grad():
        return judge_of(readings, general and os.path.expanduser(general), new_tokens)


def with_model(recipe: PlannedRecipe, judge: Judge, texts: Mapping[Adapter, TextSource]) -> MergePlan:
    """The merge of a recipe, given the judge's model in place of one of its own, and no text that judges."""
    merge = recipe.merge
    if merge.guide is None:
        return merge
    judging = {adapter.name for adapter, source in texts.items() if source.part == "to judge"}
    sources = {
        adapter: source._replace(part="to merge") if adapter.name in judging else source
        for adapter, source in merge.guide.sources.items()
    }
    guide = replace(merge.guide, sources=sources, model=judge.singles.model)
    return replace(merge, guide=guide)


def plain_sum(merge: MergePlan) -> MergePlan:
    """The sum of all updates, each with weight 1."""
    method = METHODS["lora_task_arithmetic"]
    assert merge.again is not None
    return merge.again(Variation(method, method.bind({}), dict.fromkeys(merge.adapters, 1.0)))
