"""How the plugin gets loaded: wheel, editable install, subprocess, library use, and not at all."""

import os
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import ROOT

REGISTERED = (
    "from mergekit.merge_methods import registry; import mergekit_tspa;"
    "print(mergekit_tspa.__file__, 'tspa_lora' in registry._METHODS)"
)


def python(code: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        capture_output=True, text=True, env=os.environ | env, cwd="/",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT],
        check=True,
        capture_output=True,
    )
    (file,) = out.glob("*.whl")
    return file


def test_editable():
    assert python(REGISTERED) == f"{ROOT}/mergekit_tspa/__init__.py True"


def test_wheel(wheel, tmp_path):
    """Installed beside the environment and put first on the path."""
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, wheel], check=True
    )
    assert python(REGISTERED, PYTHONPATH=str(tmp_path)) == f"{tmp_path}/mergekit_tspa/__init__.py True"
    assert (tmp_path / "mergekit_tspa/py.typed").exists()


def test_wheel_holds_the_package_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert tops == {"mergekit_tspa", f"mergekit_tspa-{wheel.name.split('-')[1]}.dist-info"}


def test_off_switch():
    code = "import torch, sys; print([m for m in sys.modules if m.startswith('mergekit_tspa')])"
    assert python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "[]"
    assert "mergekit_tspa" in python(code)


def test_import_torch_loads_nothing_else():
    code = "import torch, sys; print(sorted(m for m in sys.modules if 'mergekit' in m))"
    assert python(code) == "['mergekit_tspa', 'mergekit_tspa._startup']"


@pytest.mark.parametrize(
    "first",
    [
        "import mergekit.merge",
        "from mergekit.merge import run_merge",
        "import mergekit.plan",
        "import mergekit.merge_methods",
        "from mergekit.merge_methods.registry import get",
        "import torch, mergekit.merge",
        "import mergekit_tspa, mergekit.merge",
        "import mergekit.merge, mergekit_tspa",
        "import mergekit_tspa.plugin.recipe",
        "import mergekit_tspa.plugin.merge_method",
    ],
)
def test_any_import_order(first):
    code = (
        f"{first}\nimport mergekit.merge as m, mergekit.plan as p, mergekit.merge_methods as r\n"
        "r.get('tspa_lora')\n"
        "print(hasattr(m.get_architecture_info, '__wrapped__'), hasattr(p.MergePlanner._plan, '__wrapped__'),"
        " hasattr(p.MergePlanner._plan.__wrapped__, '__wrapped__'))"
    )
    assert python(code) == "True True False"


def test_library_use_without_the_entry_point():
    code = (
        "import mergekit.merge, mergekit_tspa\nfrom mergekit.merge_methods import get\n"
        "print(get('tspa_lora').spec.name)"
    )
    assert python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "tspa_lora"


def test_a_broken_hook_leaves_torch_and_stock_mergekit_alone(tmp_path):
    code = (
        "import sys; sys.modules['mergekit_tspa.plugin.hooks'] = None\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "import torch, mergekit.merge\nfrom mergekit.merge_methods import get\nprint(get('linear').spec.name)"
    )
    assert python(code) == "linear"


def test_a_name_that_mergekit_has_is_left_to_mergekit():
    """A later mergekit may bring a method of the same name: its own one is kept, with its own planning."""
    code = (
        "import copy, dataclasses, logging, mergekit.merge\n"
        "from mergekit.merge_methods import registry\n"
        "from mergekit_tspa.plugin import hooks\n"
        "theirs = copy.copy(registry.get('linear'))\n"
        "theirs.spec = dataclasses.replace(theirs.spec, name='tspa_lora')\n"
        "for name in hooks.METHODS: registry._METHODS.pop(name)\n"
        "registry.register(theirs)\n"
        "hooks._register_methods(registry)\n"
        "print(registry.get('tspa_lora') is theirs, hooks._ours('tspa_lora'), hooks._ours('factor_linear'))"
    )
    assert python(code) == "True False True"
