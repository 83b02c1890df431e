"""What a merge would read, how often, and what that takes, before a model is loaded."""

import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from mergekit_tspa.calibration.batches import Texts
from mergekit_tspa.calibration.distill import check_texts
from mergekit_tspa.calibration.readings import SELF, Readings, few_tokens
from mergekit_tspa.merging.guide import Guide
from mergekit_tspa.merging.outputs import TensorPlan
from mergekit_tspa.methods.inputs import silent
from mergekit_tspa.methods.method import Method, Passes
from mergekit_tspa.methods.texts import SEARCHED_TEXTS, TextParameters

LOG = logging.getLogger(__name__)

HEADER = 8  # about how many tokens a chat template puts before an answer
_LAYER = re.compile(r".*?\.\d+\.")


class ReadingPlan(NamedTuple):
    """What reading the texts of a merge would be."""

    said: list[str]  # sentences
    memory: dict[str, int]  # bytes, by what takes them; an upper estimate


def reading_plan(method: Method, tensors: Sequence[TensorPlan], guide: Guide) -> ReadingPlan:
    """What would be read: texts and tokens of each adapter, the model that reads them, and how often.

    Raises:
        InputError: a file is not readable, a line is no example, an adapter has too few, or statistics are of
            something else.
    """
    readings = guide.readings(tensors, "cpu", silent)
    given = readings.texts()
    readings.stored()
    parameters = tensors[0].parameters
    assert method.passes is not None and isinstance(parameters, TextParameters)
    passes = method.passes(parameters)
    if passes.held_out:
        check_texts(given)
    said, memory, warnings = [], {}, readings.warnings
    for adapter, source in readings.sources.items():
        if adapter.name in given:
            own = given[adapter.name]
            tokens = sum(len(example.tokens) for example in own)
            open_ = sum(example.completion is None for example in own)
            what = f"{len(own)} texts, {tokens:,} tokens"
            if open_:
                what += f", {open_} of them prompts whose answers it writes itself"
            else:
                warnings += few_tokens(adapter.name, own)
        elif source.examples == SELF:
            what = f"{readings.how.self_texts} texts that it writes itself"
        else:
            what = f"statistics in {source.calibration}"
        said.append(f"{adapter.name}: {what}")
    if any(source.examples is not None for source in readings.sources.values()):
        assert readings.base is not None
        nbytes = sum(4 * math.prod(shape) for shape in readings.base.shapes.values())
        limit = readings.memory_limit
        streamed = limit is not None and nbytes > limit
        how = "streamed from disk in every pass" if streamed else "held in memory"
        said.append(f"the base reads them, {nbytes / 2**30:.3g} GiB in float32, {how}")
        searched = parameters.lambda_ == "auto" and readings.has_given_texts
        said += _runs(passes, readings, given, searched)
        memory["the base that reads texts"] = min(nbytes, limit or nbytes)
        memory["texts on their way through it"] = _on_the_way(passes, readings, given, searched)
        numbers = (len(tensor.sources) * passes.statistics(*tensor.shape) for tensor in tensors)
        memory["statistics"] = 4 * sum(numbers)
    for warning in warnings:
        LOG.warning("%s", warning)
    return ReadingPlan(said, memory)


def _runs(passes: Passes, readings: Readings, given: Texts, searched: bool) -> list[str]:
    """What would be run, in the order in which it would be."""
    written = sum(example.completion is None for own in given.values() for example in own)
    written += readings.how.self_texts * sum(one.examples == SELF for one in readings.sources.values())
    runs = [f"{written} answers of at most {readings.how.new_tokens} tokens are written"] if written else []
    runs.append(passes.said)
    if searched:
        runs.append(f"a search for lambda on up to {SEARCHED_TEXTS} texts of each adapter")
    return [f"what will be run: {'; then '.join(runs)}"]


def _on_the_way(passes: Passes, readings: Readings, given: Texts, searched: bool) -> int:
    """An upper estimate of the bytes that texts take on their way through the base.

    What a layer answers is counted three times, for norms and activations, and so are logits, which have
    gradients besides where there are any.  Without gradients one layer is in memory at a time.
    """
    layers: Counter[str] = Counter()
    vocabulary = 0
    for name, shape in readings.base.shapes.items():
        if len(shape) == 2 and (found := _LAYER.match(name)):
            layers[found[0]] += shape[0]
        elif len(shape) == 2:
            vocabulary = max(vocabulary, shape[0])
    new = readings.how.new_tokens
    lengths = [[len(e.tokens) + new * (e.completion is None) for e in own] for own in given.values()]
    alone = sum(source.examples == SELF for source in readings.sources.values())
    lengths += [[HEADER + new] * readings.how.self_texts] * alone
    longest = max(max(own) for own in lengths)

    def at_once(tokens: int | None, texts: int | None) -> int:
        count = sum(len(own) if texts is None else min(texts, len(own)) for own in lengths)
        return count * longest if tokens is None else min(count * longest, max(tokens, longest))

    read = at_once(passes.tokens, passes.texts)
    if passes.gradients:
        values = read * (3 * layers.total() + 4 * vocabulary)
    else:
        values = read * 3 * max(layers.values(), default=0)
    if searched:
        values = max(values, at_once(readings.answer_tokens, SEARCHED_TEXTS) * 3 * vocabulary)
    return 4 * values
