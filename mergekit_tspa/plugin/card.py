"""Model cards: what was merged, by which method of which paper, with which weights, versions and seed."""

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import yaml

from mergekit_tspa.methods import MEAN_OF_MODELS, METHODS
from mergekit_tspa.plugin.aligned_mean import AlignedMean
from mergekit_tspa.plugin.compat import CARD_TEMPLATE, MergeConfiguration, ModelPath
from mergekit_tspa.plugin.recipe import weights_of


def model_card(config: MergeConfiguration, config_yaml: str, name: str | None = None) -> str:
    """mergekit's card with the paper, the weight of each input in the recipe's order, versions and seed.

    It depends on the recipe and the versions alone, so two runs write the same.
    """
    weights = weights_of(config, base=config.merge_method == MEAN_OF_MODELS)
    inputs = [reference.lora or reference.model for reference in weights]
    hub = {path.path: None for path in (config.base_model.model, *inputs) if _on_hub(path)}
    metadata = {"base_model": [*hub], "tags": ["mergekit", "merge"], "library_name": "transformers"}
    return CARD_TEMPLATE.format(
        metadata=yaml.dump(metadata),
        name=name or "Merged model",
        merge_method=_method(config),
        base_text=f" using {_link(config.base_model.model)} as a base, {_made_by(config)}",
        model_list="\n" + _table({_link(path): used for path, used in zip(inputs, weights.values())}),
        config_yaml=config_yaml,
    )


def adapter_card(config: MergeConfiguration, weights: Mapping[str, str], source: str) -> str:
    """The card of an adapter: base, method, versions, seed, `weights` of the adapters, and the recipe."""
    base = str(config.base_model)
    metadata = {"base_model": base, "library_name": "peft", "tags": ["mergekit", "merge", "lora"]}
    return (
        f"---\n{yaml.dump(metadata, sort_keys=False)}---\n\n"
        f"# {Path(base).name}: merged adapter\n\n"
        f"LoRA adapters merged by {_method(config)}, {_made_by(config)}.\n\n"
        f"{_table(weights)}\n\n"
        f"```yaml\n{source.strip()}\n```\n"
    )


def _table(weights: Mapping[str, str]) -> str:
    return "\n".join(
        ["| input | weight |", "|---|---|", *(f"| {name} | {used} |" for name, used in weights.items())]
    )


def _method(config: MergeConfiguration) -> str:
    if config.merge_method == MEAN_OF_MODELS:
        spec = AlignedMean.spec
        return f"[{spec.pretty_name}]({spec.reference_url}) (Wortsman et al., 2022; Ainsworth et al., 2023)"
    method = METHODS[config.merge_method]
    return f"[{method.title}]({method.url}) ({method.paper})"


def _made_by(config: MergeConfiguration) -> str:
    """Versions, and the seed of methods that have one."""
    versions = ", ".join(
        f"{package} {version(package)}" for package in ("mergekit-tspa", "mergekit", "torch")
    )
    method = METHODS.get(config.merge_method)
    fields = method.parameter_fields() if method else {}
    seed = (config.parameters or {}).get("seed", fields["seed"].default) if "seed" in fields else None
    return f"with {versions}" + (f" and seed {seed}" if seed is not None else "")


def _on_hub(path: ModelPath) -> bool:
    """What is no directory here must be a repository of the hub; it was read from somewhere."""
    return not os.path.exists(path.path)


def _link(path: ModelPath) -> str:
    return f"[{path}](https://huggingface.co/{path.path})" if _on_hub(path) else str(path)
