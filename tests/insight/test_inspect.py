"""The command: what it measures of a merge, what it says, and the page it writes."""

import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from mergekit_tspa import merge_adapters
from mergekit_tspa.commands.main import main
from mergekit_tspa.insight.findings import SUM_FACTORS, findings
from mergekit_tspa.insight.gather import inspect_adapters
from mergekit_tspa.insight.inspection import Place, short_names
from mergekit_tspa.insight.pictures import NAMES, Picture
from mergekit_tspa.plugin.inspect_recipe import inspect_recipe
from tests.conftest import ROOT, recipe, run, save_adapter, save_llama, write_recipe
from tests.plugin.test_extracted_inputs import save_full, with_full

EXAMPLES = [f"examples/adapters/{task}" for task in ("math", "code", "safety", "roleplay")]
MODEL = ROOT / "build/models/SmolLM2-135M-Instruct"


def inspect(*arguments, out, exit_code=0):
    result = CliRunner().invoke(
        main, ["inspect", *map(str, arguments), "--out", str(out)], env={"COLUMNS": "1000"}
    )
    assert result.exit_code == exit_code, (result.output, result.exception)
    return result


def inspected(config, layers=2):
    options = MergeOptions(quiet=True)
    return inspect_recipe(MergeConfiguration.model_validate(config), options, layers, lambda *_: None)


def sentences(paths, base=None):
    inspection = inspect_adapters([str(path) for path in paths], base and str(base), None, lambda *_: None)
    return "\n".join(finding.text for finding in findings(inspection))


def edited(source, path, edit):
    """An adapter whose tensors went through `edit(name, tensor)`."""
    file = shutil.copytree(source, path) / "adapter_model.safetensors"
    save_file({name: edit(name, t).contiguous() for name, t in load_file(file).items()}, file)
    return path


class Page(HTMLParser):
    def __init__(self, file):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def check_page(out, *names):
    """It is whole, needs nothing from elsewhere, can be read without seeing, and has these pictures."""
    page = Page(out / "inspect.html")
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed") and not any(
            a.startswith("on") for a in attributes
        )
        for name in ("src", "srcset", "href", "poster", "action", "data"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), attributes
    assert "url(" not in page.source and "@import" not in page.source
    assert all(image["alt"].strip() for image in page.all("img")) and page.all("html")[0]["lang"] == "en"
    assert all(cell.get("scope") for cell in page.all("th")) and len(page.all("h1")) == 1
    assert {heading["id"] for heading in page.all("h2")} >= {"summary", "adapters", "modules", *names}
    files = {f"inspect-{name}{theme}.png" for name in names for theme in ("", "-dark")} | {"inspect.html"}
    assert {file.name for file in out.iterdir() if file.name.startswith((".", "inspect"))} == files
    for image, source in zip(page.all("img"), page.all("source")):
        assert image["src"].startswith("data:image/png;base64,iVBOR") and image["src"] != source["srcset"]
        assert source["media"] == "(prefers-color-scheme: dark)"
    return page


# -- the measured facts ---------------------------------------------------------------------------------------


def test_example_adapters(tmp_path):
    """As a user runs it, without any base: they share their initial A, and the page says what follows."""
    result = run("mergekit-tspa", "inspect", *EXAMPLES, "--out", tmp_path / "report")
    assert result.returncode == 0, result.stderr
    *said, last = result.stdout.strip().splitlines()
    assert 5 <= len(said) <= 12 and all(re.search(r"\d", line) for line in said)
    assert last == f"Report: {tmp_path}/report/inspect.html"
    assert (
        "All pairs read the same inputs" in result.stdout and "overlap by 83% (chance 1.4%)" in result.stdout
    )
    assert "Do not sum factors apart (factor_linear" in result.stdout
    assert "code and safety pull against each other in layer 0 q_proj" in result.stdout
    page = check_page(tmp_path / "report", "norms", "ranks", "pairs", "meeting", "pulls")
    assert all(line.removeprefix("- ").split(". ")[0] in page.text for line in said)
    assert page.source.count("<tr>") > 60 and "layer 29 v_proj" in page.text


@pytest.mark.skipif(not MODEL.exists(), reason="`make test` builds the model first")
def test_example_recipe(tmp_path):
    """TSPA's stages, and what survives, on as many layers as asked."""
    result = run(
        "mergekit-tspa", "inspect", "yaml_examples/tspa.yml", "--layers", "3", "--out", tmp_path / "report"
    )
    assert result.returncode == 0, result.stderr
    assert "measured on 3 of 30 layers, evenly spaced: 0, 14, 29." in result.stdout
    assert re.search(r"tspa keeps math \d+% \(cosine 0\.\d+\), safety \d+%", result.stdout)
    assert re.search(
        r"query-key alignment 9\d\.\d%.*value-output alignment 9\d\.\d%.*LoRA alignment", result.stdout
    )
    names = "norms ranks pairs meeting pulls survival objectives angles scales".split()
    assert set(names) == set(NAMES)
    check_page(tmp_path / "report", *names)


def test_one_adapter_survives_whole(llama, adapters, tmp_path):
    for method in ("lora_task_arithmetic", "core_tsv", "tspa_lora", "lora_ties"):
        merged = inspected(
            recipe(method, llama, adapters[:1], parameters={"density": 1} if "ties" in method else {})
        )
        torch.testing.assert_close(merged.survival()[0], torch.ones(4, 1).double(), atol=1e-4, rtol=0)
        torch.testing.assert_close(merged.total_survival()[1], torch.ones(1).double(), atol=1e-4, rtol=0)
    halved = inspected(recipe("core_mean", llama, adapters[:1], [0.5], parameters={"lambda": 0.5}))
    torch.testing.assert_close(halved.total_survival()[0], torch.full((1,), 0.5).double(), atol=1e-4, rtol=0)


def test_a_sum_of_orthogonal_adapters_keeps_all(llama, adapters, tmp_path):
    """They read different inputs."""

    def half(first):
        columns = torch.arange(64) < 32
        return lambda name, t: t * (columns == first) if "lora_A" in name else t

    both = [edited(adapters[0], tmp_path / "a", half(True)), edited(adapters[0], tmp_path / "b", half(False))]
    got = inspected(recipe("lora_task_arithmetic", llama, both, [1.0, 0.25]))

    def close(value, want):
        torch.testing.assert_close(value, torch.tensor(want).double(), atol=1e-5, rtol=0)

    close(got.total_survival()[0], [1.0, 0.25])
    close(got.total_cosines()[0, 1], 0.0)
    close(got.cross, [0.0] * 4)
    assert not got.of_pairs(got.measures.overlap_in).ge(1e-9).any()


@pytest.mark.parametrize("method", ["lora_ties", "core_tsv", "ctm_ties", "tspa"])
def test_what_survives_against_the_merge_itself(method, llama, adapters):
    parameters = {"tspa": {"attention_steps": 5, "lora_steps": 5}}.get(method, {})
    weights = [1.0, 0.5, 0.75]
    got = inspected(recipe(method, llama, adapters, weights, parameters=parameters))
    updates = merge_adapters(method, adapters, weights, base=llama, **parameters)
    assert {name.removesuffix(".weight") for name in got.tensors} == updates.keys() and not got.notes
    share, cosine = got.survival()
    for i, name in enumerate(got.tensors):
        M = updates[name.removesuffix(".weight")].dense().double()
        for t, adapter in enumerate(got.adapters):
            module = name.removesuffix(".weight")
            if module not in adapter.modules:
                assert share[i, t].isnan()
                continue
            D = adapter.factors(module).dense().double()
            assert share[i, t] == pytest.approx(((M * D).sum() / D.square().sum()).item(), rel=1e-3, abs=1e-4)
            want = torch.cosine_similarity(M.flatten(), D.flatten(), dim=0).item()
            assert cosine[i, t] == pytest.approx(want, abs=1e-4)


def test_stages_are_those_of_the_solvers(llama, adapters):
    parameters = {"attention_steps": 20, "lora_steps": 20}
    got = inspected(recipe("tspa", llama, adapters, parameters=parameters))
    reports = merge_adapters("tspa", adapters, base=llama, **parameters).reports
    for stage in got.stages():
        same = [report for report in reports if report.stage == stage.name]
        for side in ("start", "end"):
            want = sum(getattr(report, side).sum().item() for report in same)
            assert getattr(stage, side).sum().item() == pytest.approx(want, rel=1e-4)
        assert (stage.end < stage.start).any() and stage.angles.nan_to_num().max() > 1
        assert sorted({got.layer_of(problem) for problem in stage.problems}) == [0, 1]
    assert (got.stages()[-1].scales.nan_to_num(1) != 1).any()
    # Adapter two has LoRA on q alone, so it has no part in value and output.
    value = next(stage for stage in got.stages() if stage.name.startswith("value"))
    assert value.angles[:, 1].isnan().all() and not value.angles[:, 0].isnan().any()
    still = inspected(recipe("tspa_lora", llama, adapters, parameters={"lora_steps": 0}))
    (stage,) = still.stages()
    assert stage.angles.nan_to_num().max() < 0.1 and torch.equal(stage.start, stage.end)


def test_gradients_filters_and_layers(llama, adapters):
    config = recipe("core_ties", llama, adapters[:2], [[0.2, 0.8], 1.0])
    config["models"][1]["parameters"]["weight"] = [{"filter": "up_proj", "value": 0.5}, {"value": 2.0}]
    got = inspected(config, layers=1)
    weights = {name: row for name, row in zip(got.tensors, got.weights.tolist())}
    assert weights["model.layers.0.self_attn.q_proj.weight"] == [0.2, 2.0]
    assert weights["model.layers.1.self_attn.q_proj.weight"] == [0.8, 2.0]
    assert weights["model.layers.1.mlp.up_proj.weight"][1] == 0.5
    assert math.isnan(weights["model.layers.1.mlp.up_proj.weight"][0])
    assert {got.places[i].layer for i in got.merge.measured.nonzero()[:, 0].tolist()} == {0}
    assert got.merge.notes == ["what survives is measured on 1 of 2 layers, evenly spaced: 0"]


def test_statistics_of_the_whole_model(llama, adapters):
    """Thresholds of some layers only are said to be that; of all layers they are those of the merge."""
    config = recipe("lora_ties", llama, adapters, parameters={"scope": "model"})
    assert any("scope: model" in note for note in inspected(config, layers=1).merge.notes)
    whole = inspected(config, layers=2)
    merged = merge_adapters("lora_ties", adapters, base=llama, scope="model")
    norms = [merged[name.removesuffix(".weight")].norm().item() for name in whole.tensors]
    assert whole.merge.norm.tolist() == pytest.approx(norms, rel=1e-4) and not whole.merge.notes


# -- what is said ---------------------------------------------------------------------------------------------


def test_the_one_piece_of_advice_was_measured():
    """On more than one set of adapters with a shared start, methods that sum factors apart are worse than the base."""
    text = (
        (ROOT / "benchmarks/results/quality.md")
        .read_text()
        .split("Four adapters of rank 8 with a seed each")[0]
    )
    measured = {name: sets for name, *sets in re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \|", text, re.M)}
    for name in SUM_FACTORS:
        assert all(loss > base for loss, base in zip(measured[name], measured["base"], strict=True))


def test_advice_without_measurements_is_not_given(llama, adapters, tmp_path):
    """Weights of equal norm made every task of the example adapters worse; nothing is said of setting weights."""
    large = edited(adapters[0], tmp_path / "large", lambda name, t: t * 4 if "lora_B" in name else t)
    other = save_adapter(llama, tmp_path / "other", seed=3)
    for config in (recipe("core_tsv", llama, [large, other]), recipe("tspa", llama, [large, other])):
        config["parameters"] = (
            {"attention_steps": 5, "lora_steps": 5} if config["merge_method"] == "tspa" else {}
        )
        assert not any(finding.advice for finding in findings(inspected(config)))
    assert "nats" not in sentences(EXAMPLES) and "set weights" not in sentences(EXAMPLES)


def test_own_starts_and_a_fight(llama, tmp_path):
    """Adapters of their own seeds; one of them gets a part that points against the other in one weight."""
    one, two = (save_adapter(llama, tmp_path / str(seed), seed=seed) for seed in (1, 2))
    assert "do not share an initial A" in sentences([one, two])
    assert "No two adapters fight: the smallest cosine of 4 meetings" in sentences([one, two])
    mine = load_file(one / "adapter_model.safetensors")
    against = edited(two, tmp_path / "against", lambda name, t: _against(mine, name, t))
    said = sentences([one, against])
    (line,) = (line for line in said.splitlines() if "pull against each other" in line)
    assert (
        "1 and against pull against each other in layer 1 v_proj: mean cosine -1.00, sign conflict 100%"
        in line
    )
    assert "keeps 0% of" in line


def _against(mine, name, t):
    if "layers.1.self_attn.v_proj" not in name:
        return t
    return -mine[name] if "lora_B" in name else mine[name]


def test_unequal_sizes(llama, adapters, tmp_path):
    large = edited(adapters[0], tmp_path / "large", lambda name, t: t * 2 if "lora_B" in name else t)
    said = sentences([adapters[0], large])
    assert "large is the largest" in said and "2.0 times less" in said and "set weights" not in said


def test_methods_that_sum_factors(llama, adapters, tmp_path):
    same = edited(adapters[0], tmp_path / "same", lambda name, t: t.flip(0) if "lora_B" in name else t)
    texts = {
        method: " ".join(f.text for f in findings(inspected(recipe(method, llama, [adapters[0], same]))))
        for method in ("factor_linear", "core_tsv")
    }
    assert "Take another method than factor_linear" in texts["factor_linear"]
    assert "row spaces overlap by 100%" in texts["core_tsv"] and "another method" not in texts["core_tsv"]


def test_adapters_that_never_meet(llama, tmp_path):
    parts = [save_adapter(llama, tmp_path / part, target_modules=[part]) for part in ("q_proj", "v_proj")]
    inspect(*parts, out=tmp_path / "out")
    page = check_page(tmp_path / "out", "norms", "ranks")
    assert "No two of the 2 adapters share a weight (0 of 4)" in page.text
    third = save_adapter(llama, tmp_path / "third", seed=2, target_modules=["q_proj"])
    inspect(*parts, third, out=tmp_path / "out")
    page = check_page(tmp_path / "out", "norms", "ranks", "pairs", "meeting", "pulls")
    assert "2 of 3 pairs share no weight: q_proj and v_proj; v_proj and third." in page.text


def test_what_is_not_measured_is_said(llama, tmp_path):
    kinds = {"dora": {"use_dora": True}, "saved": {"modules_to_save": ["input_layernorm"]}}
    kinds["pissa"] = {"init_lora_weights": "pissa"}
    paths = [
        save_adapter(llama, tmp_path / name, seed=i, **kind) for i, (name, kind) in enumerate(kinds.items())
    ]
    said = sentences(paths)
    assert "the DoRA magnitudes of 4 weights are not measured" in said
    assert "2 tensors that adapters trained directly" in said
    assert "pissa: its 4 PiSSA or OLoRA updates need the base (--base) and are not measured" in said
    assert "PiSSA" not in sentences(paths, llama)
    config = recipe("core_tsv", llama, paths, [1.0, 1.0, 0.0])
    notes = " ".join(inspected(config).notes)
    assert "pissa: it has weight 0 everywhere, and is left out here" in notes and "DoRA magnitudes" in notes


def test_full_models(llama, adapters, tmp_path):
    full = save_full(llama, tmp_path / "full", adapters[2])
    got = inspected(with_full(llama, adapters[:1], [full], {"extract_rank": 3}))
    assert got.kinds_of == ["LoRA", "full model"] and got.names == ["one", "full"]
    assert re.search(r"is a full model: .* keep \d\d\.\d% of its difference to the base", " ".join(got.notes))


# -- the page and its files -----------------------------------------------------------------------------------


def test_hostile_names(adapters, tmp_path):
    names = ["<img src=x onerror=alert(1)>", r"$\frac{$ %d {} 模型", 'a"b', "line\nbreak\x1b[31m"]
    paths = [shutil.copytree(adapters[0], tmp_path / name) for name in names]
    result = inspect(*paths, out=tmp_path / "out")
    page = check_page(tmp_path / "out", "norms", "ranks", "pairs", "meeting", "pulls")
    assert names[0] in page.text and len(page.all("img")) == 5 and "\x1b" not in result.stdout


def test_single_adapter(adapters, tmp_path):
    result = inspect(adapters[2], out=tmp_path / "out")
    page = check_page(tmp_path / "out", "norms", "ranks")
    assert "of its energy in" in result.stdout and "cosine" not in result.stdout
    assert "One adapter: three" in page.text and "smallest cosine" not in page.text


def test_embeddings_and_zeros(llama, tmp_path):
    """Weights outside the layers have no place in pictures but are in the table; zero updates are not compared."""
    paths = [
        save_adapter(
            llama, tmp_path / str(i), seed=i, target_modules=["embed_tokens"], save_embedding_layers=False
        )
        for i in range(2)
    ]
    inspect(*paths, out=tmp_path / "out")
    assert "embed_tokens" in check_page(tmp_path / "out", "pairs").text
    zero = edited(paths[0], tmp_path / "zero", lambda name, t: 0 * t)
    inspect(zero, paths[1], out=tmp_path / "out")
    page = check_page(tmp_path / "out")
    assert "No two of the 2 adapters share a weight" in page.text


def test_quiet_and_the_same_report_twice(llama, adapters, tmp_path):
    file = write_recipe(tmp_path / "r.yml", recipe("core_dare_ties", llama, adapters[:2]))
    assert inspect(file, "--layers", 2, "--quiet", out=tmp_path / "a").output == ""
    shown = inspect(file, "--layers", 2, out=tmp_path / "b").stderr
    assert "measuring" in shown and "core_dare_ties" in shown and "drawing" in shown
    assert (tmp_path / "a/inspect.html").read_bytes() == (tmp_path / "b/inspect.html").read_bytes()


def test_other_files_stay_and_old_ones_go(llama, adapters, tmp_path):
    out = tmp_path / "out"
    inspect(write_recipe(tmp_path / "r.yml", recipe("core_tsv", llama, adapters[:2])), out=out)
    for name in ("notes.txt", "inspect-mine.png"):
        (out / name).write_text("kept")
    inspect(adapters[0], out=out)
    assert (out / "notes.txt").read_text() == (out / "inspect-mine.png").read_text() == "kept"
    (out / "inspect-mine.png").unlink()
    check_page(out, "norms", "ranks")


def test_a_report_that_is_not_whole_has_no_page(adapters, tmp_path, monkeypatch):
    out = tmp_path / "out"
    inspect(adapters[0], out=out)

    def full(self, theme):
        raise OSError("No space left on device")

    monkeypatch.setattr(Picture, "png", full)
    result = inspect(adapters[0], out=out, exit_code=1)
    assert (
        "Error: " in result.stderr
        and "No space left" in result.stderr
        and not (out / "inspect.html").exists()
    )


def test_a_full_model_beside_an_adapter(llama, adapters, tmp_path):
    full = save_llama(tmp_path / "full", seed=1)
    said = inspect(full, adapters[0], "--base", llama, out=tmp_path / "out").stdout
    assert "is a full model: what is measured are factors" in said


def test_errors(llama, adapters, tmp_path):
    def error(*arguments, out=tmp_path / "out"):
        result = inspect(*arguments, out=out, exit_code=1)
        (line,) = result.stderr.split("\r")[-1].strip().splitlines()
        assert not (out / "inspect.html").exists() or out != tmp_path / "out"
        return line.partition("Error: ")[2]

    nan = edited(adapters[0], tmp_path / "nan", lambda name, t: t * math.nan)
    wide = edited(
        adapters[0], tmp_path / "wide", lambda name, t: torch.cat([t, t], 1) if "lora_A" in name else t
    )
    assert "there is no such adapter directory" in error(tmp_path / "none")
    assert "NaN or Inf" in error(adapters[0], nan)
    assert "give the base whose difference to it is merged (base=, --base)" in error(llama)
    assert "listed twice" in error(adapters[0], adapters[0])
    assert "listed twice" in error(adapters[0], tmp_path / "nan/../nan/../" / adapters[0])
    assert "updates of different shapes" in error(adapters[0], wide)
    assert "is a file" in error(adapters[0], out=write_recipe(tmp_path / "file", {}))
    file = write_recipe(tmp_path / "r.yml", recipe("core_tsv", llama, adapters))
    assert "give one recipe alone" in error(file, adapters[0])
    assert "set base_model there" in error(file, "--base", llama)
    assert "do you mean" in error(write_recipe(tmp_path / "m.yml", recipe("lora_tis", llama, adapters)))
    assert "is not a method on adapters" in error(
        write_recipe(tmp_path / "m.yml", recipe("ties", llama, adapters))
    )
    (tmp_path / "broken.yml").write_text("a: [")
    assert "broken.yml: not readable as YAML" in error(tmp_path / "broken.yml")
    lost = recipe("core_tsv", tmp_path / "nowhere", adapters)
    assert "nowhere: there is no such model" in error(write_recipe(tmp_path / "lost.yml", lost))
    weightless = shutil.copytree(
        llama, tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors")
    )
    lost = recipe("core_tsv", weightless, adapters)
    assert "no model.safetensors" in error(write_recipe(tmp_path / "lost.yml", lost))
    page = tmp_path / "mine/inspect.html"
    page.parent.mkdir()
    page.write_text("<p>my own</p>")
    assert "is not a report" in error(adapters[0], out=page.parent) and page.read_text() == "<p>my own</p>"
    empty = shutil.copytree(adapters[0], tmp_path / "empty")
    config = json.loads((empty / "adapter_config.json").read_text())
    (empty / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    assert "nothing to inspect" in error(empty)


def test_names():
    assert short_names(["runs/a/last", "runs/b/last/", "./math"]) == ["a/last", "b/last", "math"]
    assert short_names(["x" * 60, "x" * 61]) == [f"{t} {'x' * 13}…{'x' * 14}" for t in (1, 2)]
    assert short_names(["a\nb"]) == ["a\N{REPLACEMENT CHARACTER}b"]
    assert Place.of("lm_head.weight") == Place(None, "lm_head")
    assert Place.of("model.layers.3.mlp.experts.7.up_proj.weight") == Place(3, "mlp.experts.*.up_proj")
    assert Place.of("model.layers.3.mlp.experts.gate_up_proj[12]") == Place(3, "mlp.experts.gate_up_proj*")
    assert Place.of("vision_tower.layers.1.q.weight") == Place(1, "vision_tower: q")
