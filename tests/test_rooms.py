"""Which package may import what, and how files are called."""

import ast
import sys
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mergekit_tspa"
FILES = sorted(PACKAGE.rglob("*.py"))
CORE = {"errors", "linalg", "updates"}
ALLOWED = {  # room -> rooms of this package it may import
    "base": {"base", *CORE},
    "symmetry": {"symmetry", "alignment", "base", *CORE},
    "adapters": {"adapters", "symmetry", "base", *CORE},
    "alignment": {"alignment", "errors"},
    "spaces": {"spaces", *CORE},
    "rules": {"rules", "errors", "linalg"},
    "calibration": {"calibration", "adapters", "base", *CORE},
    "methods": {
        *("methods", "calibration", "adapters", "symmetry", "base", "alignment", "spaces", "rules"),
        *("threads", *CORE),
    },
    "merging": {
        *("merging", "methods", "calibration", "adapters", "symmetry", "base", "alignment", "spaces"),
        *("rules", "threads", *CORE),
    },
    "jobs": {"jobs", "errors"},
    "insight": {"insight", "merging", "methods", "adapters", "symmetry", "base", *CORE},
    "tuning": {
        *("tuning", "jobs", "scoring", "insight", "merging", "methods", "calibration", "adapters", "base"),
        *CORE,
    },
    "scoring": {"scoring", "insight", "merging", "methods", "calibration", "adapters", "base", *CORE},
}

MODULES = {"pyyaml": "yaml"}  # distributions whose module has another name
REPORT_FILES = {  # of the extra `report`
    "insight/page.py",
    "insight/pictures.py",
    "scoring/score_page.py",
    "tuning/tune_page.py",
}
RAY_FILES = {"jobs/on_ray.py"}  # of the extra `ray`
TUNE_FILES = {"tuning/study.py"}  # of the extra `tune`


def place(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def tops(file: Path) -> set[str]:
    """What a file imports from outside the package and the standard library."""
    found = {name.split(".")[0] for name in imports(file)}
    return found - {"mergekit_tspa"} - sys.stdlib_module_names


def project() -> dict:
    return pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]


def extras() -> dict[str, list[str]]:
    return project()["optional-dependencies"]


def declared(extra: str | None = None) -> set[str]:
    """The modules of the dependencies in pyproject.toml, or of an extra."""
    found = extras()[extra] if extra else project()["dependencies"]
    names = [Requirement(requirement).name for requirement in found]
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module)
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_mathematical_rooms_do_not_know_mergekit(room):
    files = list((PACKAGE / room).glob("*.py"))
    assert files
    for file in files:
        for name in imports(file):
            top, *rest = name.split(".")
            assert top != "mergekit", f"{file.name} imports {name}"
            if top == "mergekit_tspa":
                assert rest and rest[0] in ALLOWED[room], f"{file.name} imports {name}"


def test_alignment_needs_only_torch_and_geoopt():
    for file in (PACKAGE / "alignment").glob("*.py"):
        outside = {name.split(".")[0] for name in imports(file)} - {"mergekit_tspa"}
        assert outside <= {"torch", "geoopt", "math", "typing", "collections"}, file


def test_measures_need_only_torch():
    found = imports(PACKAGE / "insight" / "measures.py")
    assert {name for name in found if name.startswith("mergekit_tspa")} <= {
        "mergekit_tspa.linalg",
        "mergekit_tspa.updates",
    }
    assert {name.split(".")[0] for name in found} - {"mergekit_tspa"} <= {
        "torch",
        "math",
        "typing",
        "collections",
    }


def test_entry_needs_only_the_standard_library():
    """torch imports these two files at the end of every `import torch`."""
    for name in ("__init__.py", "_startup.py"):
        outside = {n.split(".")[0] for n in imports(PACKAGE / name)} - {"mergekit_tspa"}
        assert outside <= {"collections", "importlib", "sys", "types", "typing", "warnings"}


def test_one_file_imports_mergekit():
    knowing = {place(file) for file in FILES if "mergekit" in tops(file)}
    assert knowing == {"plugin/compat.py"}


def test_one_file_knows_private_names_of_mergekit():
    from mergekit_tspa.plugin import compat

    names = {name for needed in compat.NEEDED for name in (*needed.name.split("."), *needed.has.split())}
    private = {name for name in names if name.startswith("_") and not name.endswith("__")}
    assert private == {
        "_METHODS",
        "_device_worker",
        "_model_out_config",
        "_plan",
        "_resolve_name",
        "_tensors",
        "_tokenizer_task",
    }
    using = {
        place(file)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in private
    }
    assert using == {"plugin/compat.py"}


def test_click_stays_at_the_edge():
    """`plugin/hooks.py` is where stock commands get an exception that they print as one sentence."""
    knowing = {place(file) for file in FILES if "click" in tops(file)}
    assert {name for name in knowing if not name.startswith("commands/")} == {"plugin/hooks.py"}


def test_what_is_imported_is_declared():
    needed, report, ray = declared(), declared("report"), declared("ray")
    tune = declared("tune") - {"mergekit_tspa"}
    for file in FILES:
        allowed = needed | (report if place(file) in REPORT_FILES else set())
        allowed |= ray if place(file) in RAY_FILES else set()
        allowed |= tune if place(file) in TUNE_FILES else set()
        assert tops(file) <= allowed, f"{file}: {tops(file) - allowed}"
    # accelerate is what transformers offloads a large base with.
    assert (needed | report | ray | tune) - {"accelerate"} == set().union(*map(tops, FILES))
    (own,) = (r for r in map(Requirement, extras()["dev"]) if r.name == "mergekit-tspa")
    assert own.extras >= {"report", "ray", "tune"}


def test_ray_is_imported_when_it_is_asked_for():
    """It is optional, and importing it takes half a second."""
    for name in RAY_FILES:
        tree = ast.parse((PACKAGE / name).read_text())
        at_once = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert "ray" not in {alias.name.split(".")[0] for node in at_once for alias in node.names}


def test_no_file_shadows_a_library():
    """When a file is run by its path, modules are looked for in its folder first."""
    libraries = sys.stdlib_module_names | declared() | declared("report") | declared("ray")
    places = [path for path in PACKAGE.rglob("*") if path.suffix == ".py" or path.is_dir()]
    shadowing = {place(path) for path in places if path.stem in libraries - {"__main__"}}
    assert not shadowing


def test_a_file_name_stands_in_one_room():
    count = Counter(file.name for file in FILES if file.name != "__init__.py")
    assert {name for name, times in count.items() if times > 1} == set()


def test_the_peft_entry_knows_the_other_entry_and_no_files():
    """`merging/loaded.py` adds to a loaded model."""
    found = imports(PACKAGE / "merging" / "loaded.py")
    outside = {name.split(".")[0] for name in found} - {"mergekit_tspa"}
    assert outside <= {"peft", "torch", "collections", "contextlib", "logging", "typing"}
    rooms = {name.split(".")[1] for name in found if name.startswith("mergekit_tspa.")}
    assert rooms <= {"adapters", "base", "errors", "merging", "methods", "updates"}
