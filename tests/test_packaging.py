"""What lands in a wheel and a source distribution, from the metadata alone (nothing is built or imported)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = json.loads((ROOT / "csrc" / "manifest.json").read_text())

_PROBE = """
import sys, json, setuptools
kept = {}
setuptools.setup = lambda **kw: kept.update(kw)
sys.argv = ["setup.py", "egg_info"]
exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__file__": "setup.py", "__name__": "__main__"})
kept["ext_modules"] = [e.name for e in kept["ext_modules"]]
kept.pop("cmdclass")
print(json.dumps(kept))
"""


@pytest.fixture(scope="module")
def setup_arguments() -> dict:
    env = {**os.environ, "FVGEN_BUILD_CUDA": "0"}
    out = subprocess.run([sys.executable, "-c", _PROBE], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def test_every_package_folder_is_listed(setup_arguments):
    packages = set(setup_arguments["packages"])
    expected = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "fvgen").rglob("__init__.py")}
    expected |= {"fvgen." + ".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "kernels").rglob("__init__.py")}
    assert packages == expected
    assert not any(p == "kernels" or p.startswith("kernels.") for p in packages), "another package has that name"


def test_kernels_come_from_their_own_folder(setup_arguments):
    assert setup_arguments["package_dir"]["fvgen.kernels"] == "kernels"


def test_data_files_are_matched(setup_arguments):
    patterns = setup_arguments["package_data"]["fvgen"]
    for name in ("assets/tiny/model.safetensors", "assets/example/photo.jpg", "codec/config.json"):
        assert any(Path(name).full_match(p) if hasattr(Path, "full_match") else _match(name, p) for p in patterns), name


def _match(name: str, pattern: str) -> bool:
    """``Path.full_match`` of Python 3.13 for patterns with ``**/``."""
    import re

    regex = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
    return re.fullmatch(regex, name) is not None


def test_pure_python_without_the_extension(setup_arguments):
    assert setup_arguments["ext_modules"] == []
    assert setup_arguments["options"] == {}


@pytest.mark.parametrize("key", ["core_sources", "core_headers", "torch_sources", "test_sources"])
def test_source_list_is_exact(key):
    """Every source of the manifest exists, and no source is forgotten."""
    listed = {ROOT / name for name in MANIFEST[key]}
    folder, suffixes = {
        "core_sources": ("core", {".cu"}),
        "core_headers": ("core", {".h", ".cuh"}),
        "torch_sources": ("torch", {".cpp"}),
        "test_sources": ("tests", {".cu", ".cpp"}),
    }[key]
    assert listed == {p for p in (ROOT / "csrc" / folder).iterdir() if p.suffix in suffixes}


def test_core_knows_nothing_of_torch():
    for name in [*MANIFEST["core_sources"], *MANIFEST["core_headers"]]:
        assert "torch/" not in (ROOT / name).read_text(), name


def test_source_distribution_has_the_sources():
    text = (ROOT / "MANIFEST.in").read_text()
    for folder in ("csrc", "kernels", "_build_backend"):
        assert f"graft {folder}" in text


@pytest.mark.parametrize("value", ["yes", "2"])
def test_unknown_build_switch_is_an_error(value):
    env = {**os.environ, "FVGEN_BUILD_CUDA": value}
    done = subprocess.run([sys.executable, "-c", _PROBE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "FVGEN_BUILD_CUDA" in done.stderr


def test_one_version():
    import fvgen

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == fvgen.__version__
    assert f"version: {fvgen.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {fvgen.__version__}" in (ROOT / "CHANGELOG.md").read_text()


PTXAS = """\
ptxas info    : Compiling entry function '_Z4goodPf' for 'sm_90'
ptxas info    : Function properties for _Z4goodPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers
ptxas info    : Compiling entry function '_Z3badPf' for 'sm_90'
ptxas info    : Function properties for _Z3badPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""


@pytest.mark.parametrize(
    ("log", "status"), [(PTXAS, 1), (PTXAS.partition("ptxas info    : Compiling entry function '_Z3")[0], 0), ("", 1)]
)
def test_spills_are_found(tmp_path, monkeypatch, capsys, log, status):
    spec = importlib.util.spec_from_file_location("check_spills", ROOT / "tools" / "check_spills.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    (tmp_path / "build.log").write_text(log)
    monkeypatch.setattr(sys, "argv", ["check_spills.py", str(tmp_path / "build.log")])
    assert tool.main() == status
    assert ("_Z3badPf (sm_90): 20 bytes spilled, 255 registers" in capsys.readouterr().out) == ("_Z3bad" in log)
