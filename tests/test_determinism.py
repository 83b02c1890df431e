"""Two runs of every method write the same files, byte for byte."""

import json

import pytest
from safetensors.torch import load_file

from mergekit_tspa import METHODS
from tests.conftest import recipe, run, save_adapter, save_llama, write_recipe
from tests.plugin.test_merge import check, save_tokenizer


@pytest.fixture(scope="module")
def every_method(tmp_path_factory):
    """A recipe per method, thresholds over the whole model where a method has them, for `mergekit-multi`."""
    folder = tmp_path_factory.mktemp("every")
    base = save_llama(folder / "base")
    save_tokenizer(base)
    adapters = [
        save_adapter(base, folder / f"a{seed}", seed=seed, target_modules="all-linear") for seed in (1, 2, 3)
    ]
    texts = folder / "texts.jsonl"
    texts.write_text(
        '{"prompt": "w1 w2", "completion": " w3 w4 w5 w6"}\n{"text": "w7 w8 w9"}\n{"prompt": "w5"}\n' * 2
    )
    recipes = []
    for name, method in METHODS.items():
        wanted = {
            "scope": "model",
            "lora_steps": 20,
            "attention_steps": 10,
            "rank": 4,
            "steps": 4,
            "new_tokens": 4,
            "k": 2,
            "c": 1,
            "adapter": True,
        }
        parameters = {key: wanted[key] for key in wanted if key in {"adapter", *method.parameter_fields()}}
        if name.endswith("_emr") and name != "ctm_emr":
            del parameters["rank"]  # their masks are those of the whole rank
        config = recipe(name, base, adapters, [1.0, 0.5, 0.8], name=f"{name}-merge", parameters=parameters)
        for model in config["models"]:  # most methods do not look at them
            model["parameters"]["examples"] = str(texts)
        recipes.append(config)
    return write_recipe(folder / "every.yml", recipes)


def written(every_method, out, *options, **env):
    result = run("mergekit-multi", every_method, "-I", out, "--quiet", *options, **env)
    assert result.returncode == 0, result.stderr
    return {
        str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()
    }


def test_same_files_twice(every_method, tmp_path):
    """Python's order of sets differs between the runs, as it does between a user's."""
    first = written(every_method, tmp_path / "first", PYTHONHASHSEED="1")
    second = written(every_method, tmp_path / "second", PYTHONHASHSEED="2")
    assert first.keys() == second.keys()
    assert {name.split("/")[0] for name in first} == {f"{name}-merge" for name in METHODS}
    assert [name for name in first if first[name] != second[name]] == []
    assert (
        sum(name.endswith("adapter_model.safetensors") for name in first) == len(METHODS) - 1
    )  # lora_emr's is dense


def test_same_tensors_by_one_or_two_writers(every_method, tmp_path):
    """Writers share shards as they come, so names of files may differ; tensors do not."""
    options = ("--async-write", "--out-shard-size", "30K", "--no-write-model-card", "--no-copy-tokenizer")
    for threads in "12":
        written(every_method, tmp_path / threads, *options, "--write-threads", threads)
    for name in METHODS:
        one, two = (
            {
                k: v
                for file in (tmp_path / threads / f"{name}-merge").glob("model*.safetensors")
                for k, v in load_file(file).items()
            }
            for threads in "12"
        )
        weights = json.loads((tmp_path / "2" / f"{name}-merge" / "model.safetensors.index.json").read_text())[
            "weight_map"
        ]
        assert weights.keys() == one.keys()
        check(one, two, 1e-30)


def test_the_card_names_what_is_needed_to_do_it_again(every_method, tmp_path):
    from importlib.metadata import version

    documents = every_method.read_text().split("---\n")
    (dare,) = (text for text in documents if "merge_method: lora_dare_ties" in text)
    file = tmp_path / "dare.yml"
    file.write_text(dare)
    assert run("mergekit-yaml", file, tmp_path / "out").returncode == 0
    for card in ("README.md", "adapter/README.md"):
        text = (tmp_path / "out" / card).read_text()
        for package in ("mergekit-tspa", "mergekit", "torch"):
            assert f"{package} {version(package)}" in text
        assert (
            "seed 42" in text
            and "[DARE-TIES](https://arxiv.org/abs/2311.03099)" in text
            and "/a2 | 0.5 |" in text
        )
        assert "merge_method: lora_dare_ties" in text
