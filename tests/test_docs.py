"""Every recipe, command and Python example of README and docs runs, and their tables are what the program prints.

`python -m tests.test_docs` writes the tables anew.  Commands run in this process, because starting a new one for each
takes most of their time; `tests/test_commands.py` and others start the scripts as users do.
"""

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from examples.tutorial import SETUP, STEP
from tests.calibration.conftest import tiny_tokenizer
from tests.conftest import ROOT, merge, peft_merged, save_adapter, save_llama, write_lines
from tests.plugin.test_merge import save_tokenizer

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIAL = ROOT / "docs/tutorial.md"  # whose commands follow each other: they have a test of their own
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TABLE = re.compile(r"<!-- `(mergekit-tspa [^`]*)` -->\n(.*?)<!-- end[^>]*-->", re.DOTALL)
# Commands that set the project up or take minutes; what they do is tested elsewhere.
ELSEWHERE = ("make demo", "make test", "pip install", "python benchmarks")
SCRIPTS = {"mergekit-yaml": "mergekit.scripts.run_yaml", "mergekit-tspa": "mergekit_tspa.commands.main"}


def blocks(kind: str) -> list:
    pages = [page for page in PAGES if page != TUTORIAL]
    found = [(page, block) for page in pages for k, block in BLOCK.findall(page.read_text()) if k == kind]
    return [pytest.param(block, id=f"{page.stem}-{i}") for i, (page, block) in enumerate(found)]


def printed(command: str) -> str:
    """What a command writes to its standard output."""
    name, *arguments = shlex.split(command, comments=True)
    if "--ray" in arguments:  # its workers need a process of their own
        script = str(Path(sys.executable).parent / name)
        result = subprocess.run([script, *arguments], capture_output=True, text=True)
        assert result.returncode == 0, f"{command}\n{result.stderr}"
        return result.stdout
    result = CliRunner().invoke(import_module(SCRIPTS[name]).main, arguments)
    assert result.exit_code == 0, f"{command}\n{result.output}{result.exception}"
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory in which the names of the pages exist, small."""
    folder = tmp_path_factory.mktemp("pages")
    base = save_llama(folder / "path/to/base")
    save_tokenizer(base)
    for seed, name in enumerate(("math", "code", "safety", "roleplay")):
        save_adapter(base, folder / "adapters" / name, seed=seed, target_modules="all-linear")
    shutil.copytree(ROOT / "examples/texts", folder / "texts")
    (folder / "held-out").mkdir()
    for by, name in enumerate(("math", "code", "safety", "roleplay"), start=1):
        # Prompts, which an adapter answers itself, so that it is better than the base there.
        write_lines(
            folder / "held-out" / f"{name}.jsonl", [{"prompt": f"w{i} w{i + by}"} for i in range(1, 13)]
        )
    shutil.copy(ROOT / "examples/texts/math.jsonl", folder / "held-out/general.jsonl")
    (folder / "build/models").mkdir(parents=True)
    speaking = shutil.copytree(base, folder / "build/models/SmolLM2-135M-Instruct")
    tiny_tokenizer().save_pretrained(speaking)
    (folder / "build/tutorial").mkdir()
    shutil.copytree(ROOT / "yaml_examples", folder / "yaml_examples")
    (folder / "examples").mkdir()
    shutil.copy(ROOT / "examples/four.yml", folder / "examples")
    for name in ("adapters", "texts", "held-out"):
        shutil.copytree(folder / name, folder / "examples" / name)
    tuned = shutil.copytree(base, folder / "path/to/finetuned")
    from safetensors.torch import save_file

    merged = peft_merged(base, folder / "adapters/code")
    save_file(
        {k: v.contiguous() for k, v in merged.items() if k != "lm_head.weight"}, tuned / "model.safetensors"
    )
    shutil.copytree(base, folder / "HuggingFaceTB/SmolLM2-135M-Instruct")
    return folder


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """Those names in an empty working directory."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(recipe: str, folder: Path) -> None:
    result = merge(yaml.safe_load(recipe), folder / "merged")
    assert result.exit_code == 0, result.output + str(result.exception)


@pytest.mark.parametrize("recipe", blocks("yaml"))
def test_recipes(recipe, here):
    run(recipe, here)
    assert (here / "merged/config.json").exists()


@pytest.mark.parametrize("commands", blocks("bash"))
def test_commands(commands, here):
    """After the recipe that stands before them: that of their page, or the README's first one."""
    (page,) = (page for page in PAGES if f"```bash\n{commands}```" in page.read_text())
    before = first_recipe(page) or first_recipe(PAGES[0])
    (here / "recipes").mkdir()
    for file in (here / "recipe.yml", here / "recipes/math-code.yml"):
        file.write_text(before)
    for line in commands.splitlines():
        if not line or line.startswith(ELSEWHERE):
            continue
        if "emr-task" in line:
            run(before, here)
        printed(sooner(line))


def sooner(command: str) -> str:
    """What it does is the same with less time."""
    return re.sub(r"--minutes [\d.]+", "--minutes 0.2", command)


def form(text: str) -> dict[str, list[str]]:
    """What stays the same in an output when its numbers and the adapters are others: tables and labels."""
    lines = text.splitlines()
    cells = [[cell.strip() for cell in re.split("[┃│]", line)] for line in lines]
    return {
        "columns": [cell for line, row in zip(lines, cells) if "┃" in line for cell in row],
        "rows": [row[1] for line, row in zip(lines, cells) if "│" in line],
        "labels": sorted(
            {label for line in lines for label in re.findall(r"^(?!Warning)[a-zA-Z, ]+(?=: )", line)}
        ),
        "sentences": sorted({line[:2] for line in lines if line.startswith("- ")}),
    }


def test_tutorial(here):
    """Its commands run in turn, and print what the page has, but for numbers, names and what depends on them."""
    text = TUTORIAL.read_text()
    assert yaml.safe_load(first_recipe(TUTORIAL)) == yaml.safe_load((ROOT / "examples/four.yml").read_text())
    for kind, code, recorded in STEP.findall(text):
        if code.startswith(SETUP):
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            if kind == "python":
                exec(compile(code, "example", "exec"), {})
            else:
                print(*(printed(sooner(line)) for line in code.splitlines()))
        if kind == "bash" and recorded:
            assert form(out.getvalue()) == form(recorded), code
        assert not recorded or out.getvalue().strip(), code


def first_recipe(page: Path) -> str | None:
    return next((block for kind, block in BLOCK.findall(page.read_text()) if kind == "yaml"), None)


@pytest.mark.parametrize("code", blocks("python"))
def test_python(code, here):
    code = re.sub(r"minutes=\d+", "minutes=0.2", code)
    exec(compile(code, "example", "exec"), {})


def test_the_conversion_for_mlx(here):
    """What docs/serving.md writes for mlx-lm is read back as the same updates."""
    from mergekit_tspa import merge_adapters

    (code,) = (
        code
        for kind, code in BLOCK.findall((ROOT / "docs/serving.md").read_text())
        if "merged-mlx" in code and kind == "python"
    )
    exec(compile(code, "example", "exec"), {})
    one, two = (
        merge_adapters("lora_task_arithmetic", [adapter], base="path/to/base")
        for adapter in ("merged-adapter", "merged-mlx")
    )
    assert one.keys() == two.keys()
    assert all((one[name].dense() - two[name].dense()).abs().max() < 1e-6 for name in one)
    config = json.loads(Path("merged-mlx/adapter_config.json").read_text())
    assert {
        f"model.layers.{i}.{key}"
        for i in range(config["num_layers"])
        for key in config["lora_parameters"]["keys"]
    } == one.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables(page):
    for command, table in TABLE.findall(page.read_text()):
        assert table.strip() == printed(command).strip(), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_page_is_in_the_site():
    """A new page needs a line under `nav` of mkdocs.yml; `make docs` checks the rest."""
    listed = re.findall(r"^ +- .*?: ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert {page.name for page in PAGES[1:]} <= set(listed)
    assert all((ROOT / "docs" / page).exists() or page in elsewhere() for page in listed)


def elsewhere() -> set[str]:
    """Pages of the site that are kept in other folders."""
    results = (f"results/{file.name}" for file in (ROOT / "benchmarks/results").glob("*.md"))
    return {"contributing.md", "changelog.md", *results}


def test_figures_are_those_of_the_results():
    """`make tables` writes them anew."""
    from benchmarks.figures import renewed

    for page in PAGES:
        assert renewed(page.read_text()) == page.read_text(), page


if __name__ == "__main__":
    for page in PAGES:
        renewed = lambda found: f"<!-- `{found[1]}` -->\n{printed(found[1]).strip()}\n<!-- end -->"  # noqa: E731
        page.write_text(TABLE.sub(renewed, page.read_text()))
