"""Statistics of the inputs of a recipe's adapters, one file each."""

from collections.abc import Iterator
from pathlib import Path

import torch

from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.calibration.store import calibration_file, hash_adapter, hash_base, save_statistics
from mergekit_tspa.errors import InputError
from mergekit_tspa.methods import METHODS
from mergekit_tspa.plugin.adapter_output import make_planner
from mergekit_tspa.plugin.compat import MergeConfiguration, MergeOptions, plan
from mergekit_tspa.plugin.planning import merge_of
from mergekit_tspa.progress import Bar


def calibrate(config: MergeConfiguration, options: MergeOptions, out: Path, k: int) -> Iterator[Path]:
    """Read the examples of a recipe's adapters, and write a file of statistics for each.

    Args:
        config: of a method that looks at texts
        out: a directory, which is made if it is not there
        k: columns that are kept of each input's second moment

    Raises:
        InputError: another method, no examples, or two adapters whose files would have one name.
    """
    method = METHODS[config.merge_method]
    if not method.guided:
        fitting = ", ".join(name for name, other in METHODS.items() if other.guided)
        raise InputError(f"{method.name} looks at no texts; calibrate a recipe of {fitting}")
    planner = make_planner(config, options)
    plan(planner)
    merge = merge_of(planner).recipe.merge
    assert merge.guide is not None and merge.guide.directory is not None
    taking = dict.fromkeys(adapter for tensor in merge.tensors for adapter, _ in tensor.sources)
    files = {adapter: calibration_file(out, adapter.name) for adapter in taking}
    if len(set(files.values())) < len(files):
        raise InputError(
            f"{out}: adapters whose directories have one name would share a file; give each a recipe"
        )
    for adapter in taking:
        if merge.guide.sources[adapter].examples is None:
            raise InputError(f"{adapter.name}: it has no examples to make statistics of")
    device = torch.device(options.device or "cpu")
    with torch.no_grad(), Bar(options.quiet) as bar:
        readings = merge.guide.readings(merge.tensors, device, bar.update)
        statistics = readings.statistics
    base = hash_base(Checkpoint(merge.guide.directory))
    out.mkdir(parents=True, exist_ok=True)
    for adapter, file in files.items():
        save_statistics(file, statistics[adapter.name], base, hash_adapter(adapter), k)
        yield file
