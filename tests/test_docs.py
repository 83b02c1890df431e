"""Every recipe, command and Python example of README and docs runs, and their tables are what the program prints.

`python -m tests.test_docs` writes the tables anew.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mergekit_tspa.commands.main import main
from tests.conftest import ROOT, merge, peft_merged, save_adapter, save_llama, write_lines
from tests.plugin.test_merge import save_tokenizer

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TABLE = re.compile(r"<!-- `(mergekit-tspa [^`]*)` -->\n(.*?)<!-- end[^>]*-->", re.DOTALL)
# Commands that set the project up or take minutes; what they do is tested elsewhere.
ELSEWHERE = ("make demo", "make test", "pip install", "python benchmarks")


def blocks(kind: str) -> list:
    found = [(page, block) for page in PAGES for k, block in BLOCK.findall(page.read_text()) if k == kind]
    return [pytest.param(block, id=f"{page.stem}-{i}") for i, (page, block) in enumerate(found)]


def printed(command: str) -> str:
    result = CliRunner().invoke(main, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    return result.output


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
    shutil.copytree(base, folder / "build/models/SmolLM2-135M-Instruct")
    shutil.copytree(ROOT / "yaml_examples", folder / "yaml_examples")
    (folder / "examples").mkdir()
    for name in ("adapters", "texts"):
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
    import yaml

    result = merge(yaml.safe_load(recipe), folder / "merged")
    assert result.exit_code == 0, result.output + str(result.exception)


@pytest.mark.parametrize("recipe", blocks("yaml"))
def test_recipes(recipe, here):
    run(recipe, here)
    assert (here / "merged/config.json").exists()


@pytest.mark.parametrize("commands", blocks("bash"))
def test_commands(commands, here):
    """After the recipe that stands before them: the README's first one, or that of their page."""
    (before,) = {b for page in PAGES for b in [first_recipe(page)] if commands in page.read_text() and b}
    (here / "recipes").mkdir()
    for file in (here / "recipe.yml", here / "recipes/math-code.yml"):
        file.write_text(before)
    for line in commands.splitlines():
        command = shlex.split(line, comments=True)
        if not command or line.startswith(ELSEWHERE):
            continue
        if command[1] == "emr-task":
            run(before, here)
        script = Path(sys.executable).parent / command[0]
        for i in (i for i, option in enumerate(command) if option == "--minutes"):
            command[i + 1] = "0.2"  # what it does is the same with less time
        result = subprocess.run([str(script), *command[1:]], capture_output=True, text=True)
        assert result.returncode == 0, f"{line}\n{result.stderr}"


def first_recipe(page: Path) -> str | None:
    return next((block for kind, block in BLOCK.findall(page.read_text()) if kind == "yaml"), None)


@pytest.mark.parametrize("code", blocks("python"))
def test_python(code, here):
    code = re.sub(r"minutes=\d+", "minutes=0.2", code)
    exec(compile(code, "example", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables(page):
    for command, table in TABLE.findall(page.read_text()):
        assert table.strip() == printed(command).strip(), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


if __name__ == "__main__":
    for page in PAGES:
        renewed = lambda found: f"<!-- `{found[1]}` -->\n{printed(found[1]).strip()}\n<!-- end -->"  # noqa: E731
        page.write_text(TABLE.sub(renewed, page.read_text()))
