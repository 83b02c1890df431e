"""A dry run of a recipe of `aligned_mean`, from the headers of the models alone."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Column, Table

from mergekit_tspa.insight.forecast import IMPORTS, at_most, files_of, itemsize, shard_size
from mergekit_tspa.insight.inspection import short_names
from mergekit_tspa.plugin.adapter_output import make_planner
from mergekit_tspa.plugin.aligned_mean import complete
from mergekit_tspa.plugin.compat import (
    LoaderCache,
    MergeConfiguration,
    MergeOptions,
    ModelReference,
    aligns_vocabulary,
)
from mergekit_tspa.plugin.dry_run import attempt, collected, open_base, stored_tensors
from mergekit_tspa.plugin.planning import base_tensors
from mergekit_tspa.plugin.recipe import weights_of
from mergekit_tspa.plugin.references import AlignedLoader, AlignedReference
from mergekit_tspa.symmetry.align import AlignedModel
from mergekit_tspa.symmetry.blocks import KINDS


@dataclass
class MeanDryRun:
    """All that can be said of a recipe of `aligned_mean`."""

    config: MergeConfiguration
    models: dict[ModelReference, AlignedModel] = field(default_factory=dict)
    rows: list[tuple[str, str]] = field(default_factory=list)  # what to print: a label and a sentence each
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def print(self, console: Console) -> None:
        """Say it."""
        console.print(f"{self.config.merge_method} on {self.config.base_model}", soft_wrap=True)
        weights = {} if self.problems else weights_of(self.config, base=True)
        names = short_names([str(reference) for reference in weights])
        table = Table(Column("model", overflow="fold"), "aligned by", "blocks", "weight", show_lines=True)
        notes: dict[str, list[str]] = {}
        for name, (reference, weight) in zip(names, weights.items()):
            aligned = self.models.get(reference)
            if aligned is None:  # the base
                table.add_row(name, "-", "-", weight)
                continue
            kinds = ", ".join(kind for kind in KINDS if kind in aligned.kinds)
            table.add_row(name, kinds, str(len(aligned.blocks)), weight)
            for note in aligned.notes:
                notes.setdefault(note, []).append(name)
        if weights:
            console.print(table)
        for note, of in notes.items():
            console.print(f"{', '.join(of)}: {note}", soft_wrap=True)
        for label, text in self.rows:
            console.print(f"{label}: {text}", soft_wrap=True)
        for warning in self.warnings:
            console.print(f"Warning: {warning}", soft_wrap=True)


def check_mean(config: MergeConfiguration, options: MergeOptions, stages: set[str]) -> MeanDryRun:
    """Check the recipe, its base, each of its models against that and, if nothing is wrong, the plan.

    Args:
        stages: names of merges whose results do not exist yet
    """
    run = MeanDryRun(config)
    problems = run.problems
    LoaderCache().setup(options=options)
    with collected(run.warnings):
        run.config, faults = complete(config, options, stages)
        problems += dict.fromkeys(fault.message for fault in faults)
        base = run.config.base_model
        given = sorted(stages & {model.model.path for model in run.config.referenced_models()})
        for stage in given:
            run.warnings.append(
                f"{stage} is the result of another stage and taken as given: the plan is not checked"
            )
        if base is None or base.lora or not base.model.path or base.model.path in given:
            return run
        if not attempt(problems, f"base {base} is not readable as a model", lambda: open_base(base, options)):
            return run
        for reference in run.config.referenced_models():
            if isinstance(reference, AlignedReference):
                loader = attempt(problems, reference, lambda: LoaderCache().get(reference))  # noqa: B023
                if isinstance(loader, AlignedLoader):
                    run.models[reference] = loader.aligned
        if not problems and not given:
            run.rows += attempt(problems, config.merge_method, lambda: [*_forecast(run, options)]) or []
    return run


def _forecast(run: MeanDryRun, options: MergeOptions) -> Iterator[tuple[str, str]]:
    """Plan the merge as mergekit would, and say what it writes and takes."""
    planner = make_planner(run.config, options)
    planner.plan_to_disk(os.devnull)  # where no earlier merge lies
    stored = stored_tensors(planner, {}, base_tensors(run.config, options))
    known = [tensor for tensor in stored.values() if tensor]
    limit = options.out_shard_size
    yield "model", files_of(stored, options.safe_serialization, limit, aligns_vocabulary(planner))
    largest = max(tensor.values for tensor in known)
    widest = max(itemsize(tensor.dtype) for tensor in known)
    parts = {
        "mergekit": IMPORTS,
        "aligning a block": max((aligned.nbytes for aligned in run.models.values()), default=0),
        "a tensor of each model": (widest * (1 + len(run.models)) + 8) * largest,
        "a shard of the output": shard_size(sum(tensor.nbytes for tensor in known), limit),
    }
    yield "memory", f"{at_most(parts)}; beside it the files of the models are mapped"
