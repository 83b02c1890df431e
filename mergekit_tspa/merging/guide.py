"""What a method that looks at texts is given beside the factors: the base as a model, and texts."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mergekit_tspa.adapters import Adapter
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.calibration.readings import SELF, Readings, TextSource
from mergekit_tspa.errors import InputError
from mergekit_tspa.merging.outputs import OutputTensor, TensorPlan
from mergekit_tspa.methods.inputs import Progress
from mergekit_tspa.methods.method import Method
from mergekit_tspa.methods.texts import TextParameters


@dataclass(frozen=True, eq=False)
class Guide:
    """The base and the texts of a merge, before a text is read or a model loaded."""

    base: ModelTensors | None
    directory: Path | None  # of the base
    sources: Mapping[Adapter, TextSource] = field(default_factory=dict)
    model: Any = None  # if it is in memory already
    tokenizer: Any = None

    def readings(
        self, tensors: Sequence[TensorPlan], device: torch.device | str | None, progress: Progress
    ) -> Readings:
        """The texts of the adapters that take part in the merge of some tensors."""
        parameters = tensors[0].parameters
        assert isinstance(parameters, TextParameters) and self.base is not None
        taking = dict.fromkeys(adapter for tensor in tensors for adapter, _ in tensor.sources)
        sources = {adapter: self.sources[adapter] for adapter in taking}
        return Readings(
            self.base,
            self.directory,
            sources,
            parameters.reading,
            device or "cpu",
            progress,
            self.model,
            self.tokenizer,
        )


def check_guide(method: Method, changed: Sequence[OutputTensor], guide: Guide | None) -> None:
    """
    Args:
        changed: tensors of the output that adapters change

    Raises:
        InputError: no base, an adapter without texts, a file that is not there, or a merge of something else
            than the layers of the base as they are.
    """
    if guide is None or guide.base is None or (guide.directory is None and guide.model is None):
        raise InputError(f"{method.name} looks at texts: give it the base model's directory (base=)")
    tensors = [part.plan for output in changed for part in output.parts]
    for adapter in dict.fromkeys(adapter for tensor in tensors for adapter, _ in tensor.sources):
        source = guide.sources.get(adapter, TextSource())
        if source.empty or (method.needs_texts and source.examples is None):
            either = "" if method.needs_texts else ", or calibration: FILE with statistics of them"
            raise InputError(
                f"{adapter.name}: {method.name} looks at texts of each adapter, and it has none; give it "
                f"examples: FILE.jsonl{either}, or examples: self for texts that it writes itself"
            )
        for file in (source.examples, source.calibration):
            if isinstance(file, str | Path) and file != SELF and not os.path.isfile(file):
                raise InputError(f"{file}: there is no such file, which {adapter.name} is given")
    if moved := next((output for output in changed if output.name != output.base), None):
        raise InputError(
            f"{moved.name}: it is {moved.base} of the base, and {method.name} reads texts with the base as "
            "it is; leave out slices that move layers"
        )
