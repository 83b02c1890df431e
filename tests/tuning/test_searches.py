"""`mergekit_tspa.tune` on tiny models, from Python."""

import json
import math

import pytest
from safetensors.torch import load_file, save_file

from mergekit_tspa import InputError, merge_adapters, score, tune
from mergekit_tspa.tuning import workbench
from mergekit_tspa.tuning.tune_report import as_json, sentences
from tests.conftest import save_adapter


@pytest.fixture
def jobs(monkeypatch):
    """What trials were run."""
    original, ran = workbench.Workbench.run, []
    monkeypatch.setattr(workbench.Workbench, "run", lambda self, job: ran.append(job) or original(self, job))
    return ran


@pytest.mark.usefixtures("few_methods")
def test_a_search_and_another_that_goes_on(speaking, prompts, tmp_path, jobs):
    base, adapters, _ = speaking
    storage = tmp_path / "new" / "trials"
    first = tune(base, adapters, prompts, minutes=0.03, storage=storage, seed=3)
    assert storage.stat().st_size and first.finalists
    before = list(jobs)
    second = tune(base, adapters, prompts, minutes=0.1, storage=storage, seed=3)
    assert [one.spec for one in second.tried[: len(first.tried)]] == [one.spec for one in first.tried]
    assert len(second.tried) > len(first.tried) and not second.untried
    unseen = before[-1].texts
    assert not [job for job in jobs[len(before) :] if job in before and job.texts != unseen]
    best = second.finalists[0]
    weights = [best.tried.spec.weights.get(str(adapter), 1.0) for adapter in adapters]
    merged = merge_adapters(
        best.tried.spec.method, adapters, weights, base=base, **best.tried.spec.parameters
    )
    report = score(base, {"best": merged}, prompts)
    # On the unseen texts, which are among those of the report, the search measured the same losses.
    known = {round(text.loss, 3) for own in report.rows[-1].judged.losses.values() for text in own}
    assert {round(text.loss, 3) for own in best.losses.values() for text in own} <= known
    json.dumps(as_json(second), allow_nan=False)


@pytest.mark.usefixtures("few_methods")
def test_a_storage_of_something_else_is_refused(speaking, prompts, tmp_path):
    """Also if an adapter is a new one in the same place, or methods may read other examples."""
    base, adapters, texts = speaking
    own = [adapters[0], save_adapter(base, tmp_path / "code", seed=2, r=2)]
    given = {"minutes": 0.02, "storage": tmp_path / "trials"}
    tune(base, own, prompts, **given)
    for arguments, options in (
        ((own[::-1], prompts), {}),
        ((own, prompts), {"examples": texts}),
        ((own, prompts), {"rank": 3}),
        ((own, prompts[::-1]), {}),
    ):
        with pytest.raises(InputError, match="trials of another search"):
            tune(base, *arguments, **given, **options)
    # Of answers that are given, which a new adapter does not change.
    given["storage"] = tmp_path / "others"
    tune(base, own, [prompts[0], texts[1]], **given)
    save_adapter(base, tmp_path / "code", seed=5, r=2)
    with pytest.raises(InputError, match="trials of another search"):
        tune(base, own, [prompts[0], texts[1]], **given)


def useless(base, path):
    """An adapter that answers as the base does."""
    file = save_adapter(base, path, seed=2, r=2) / "adapter_model.safetensors"
    save_file({name: 0 * tensor for name, tensor in load_file(file).items()}, file)
    return path


@pytest.mark.usefixtures("few_methods")
def test_an_adapter_that_gains_nothing_counts_nowhere(speaking, prompts, tmp_path):
    base, adapters, _ = speaking
    code = useless(base, tmp_path / "code")
    found = tune(base, [adapters[0], code], prompts, minutes=0.06)
    said = " ".join(sentences(found))
    assert "No better than the base on these texts: code" in said and "nan" not in said
    assert found.finalists[0].kept.tasks.keys() == {str(adapters[0])}


def test_wrong_arguments(speaking, prompts, tmp_path):
    base, adapters, _ = speaking
    nothing = useless(base, tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    for options, message in [
        ({"goal": "best"}, "goal 'best': give one of mean, worst"),
        ({"rank": 0}, "rank 0: an adapter has a rank of at least 1"),
        ({"minutes": 0}, "0 minutes are no time"),
        ({"minutes": math.nan}, "nan minutes are no time"),
        ({"minutes": math.inf}, "inf minutes are no time"),
        (
            {"general": prompts[0], "general_loss_at_most": math.nan},
            "a loss of nan on general texts is no limit",
        ),
        ({"general_loss_at_most": 1.0}, "needs such texts"),
        ({"storage": tmp_path / "file/trials"}, "the trials cannot be kept there"),
        ({"adapters": [nothing]}, "no adapter answers its own texts better than the base"),
        (
            {"held_out": [[{"text": "w1"}, {"text": "w1"}], prompts[1]]},
            "math: it has one text|no text with an answer",
        ),
        ({"examples": [prompts[0], None]}, "code: it has no examples"),
    ]:
        given = {"adapters": adapters, "held_out": prompts, "minutes": 0.01} | options
        given["held_out"] = given["held_out"][: len(given["adapters"])]
        with pytest.raises(InputError, match=message):
            tune(base, **given)
