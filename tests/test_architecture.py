"""Rules of docs/architecture.md that show in the sources: import ranks, lazy imports, file sizes, docstrings, environment."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module imports its own package and lower ranks. The longest matching name counts.
RANKS = {
    "fvgen.types": 0,
    "fvgen.envs": 0,
    "fvgen.utils": 0,
    "fvgen.geometry.conventions": 0,
    "fvgen.kernels": 1,
    "fvgen.io": 2,
    "fvgen.geometry": 3,
    "fvgen.render": 3,
    "fvgen.models": 3,
    "fvgen.recipes": 4,
    "fvgen.estimators": 4,
    "fvgen.workers": 4,
    "fvgen.codec": 4,
    "fvgen.diffusion": 4,
    "fvgen.data": 5,
    "fvgen.inference": 5,
    "fvgen.sampling": 6,
    "fvgen.evaluation": 7,
    "fvgen.pretrain": 8,
    "fvgen.distill": 8,
    "fvgen.pipeline": 9,
    "fvgen.bench": 10,
    "fvgen.explore": 10,
    "fvgen.cli": 11,
}
HEAVY = ("torch", "diffusers", "cv2", "pycolmap", "scipy", "av", "triton", "accelerate", "torchvision")


def modules() -> Iterator[tuple[str, Path]]:
    """``(module name, file)`` of every Python file in the package, kernels included."""
    for folder, prefix in ((ROOT / "fvgen", "fvgen"), (ROOT / "kernels", "fvgen.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([prefix, *(p for p in parts if p != "__init__")]), path


MODULES = dict(modules())


def placed(name: str) -> tuple[str, int] | None:
    """The longest entry of the table that contains the module, with its rank."""
    found = [p for p in RANKS if name == p or name.startswith(p + ".")]
    return (key := max(found, key=len), RANKS[key]) if found else None


def imports(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """``(line, module of the package)`` of all imports at any depth, except those for type checkers."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in node.body
        for inner in ast.walk(child)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            base = here[: len(here) - node.level + 1] if node.level else []
            names = [".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "fvgen")


def test_every_module_has_a_rank():
    assert [m for m in MODULES if m != "fvgen" and placed(m) is None] == []


@pytest.mark.parametrize("module", [m for m in MODULES if m != "fvgen"])
def test_imports_go_down(module):
    own, rank = placed(module)
    for line, name in imports(module, MODULES[module]):
        where = placed(name)
        if where is None:  # a name of the package itself, such as fvgen.__version__
            assert own == "fvgen.cli" or name == "fvgen.envs", f"line {line}: {name}"
        elif where[0].split(".")[1] != own.split(".")[1]:
            assert where[1] < rank, f"{module}, line {line}: imports {name} of rank {where[1]}, has rank {rank} itself"
            assert own != "fvgen.kernels" or where[0] == "fvgen.envs", f"line {line}: kernels import only fvgen.envs"


def test_an_upward_import_is_found(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from fvgen.pipeline import prepare\n    from ..pipeline import x\n    from . import y\n")
    names = ["fvgen.pipeline.prepare", "fvgen.pipeline.x", "fvgen.render.y"]
    assert list(imports("fvgen.render.bad", bad)) == list(enumerate(names, 2))
    assert placed("fvgen.pipeline.prepare")[1] > placed("fvgen.render.bad")[1]


@pytest.mark.parametrize("name", ["fvgen", "fvgen.envs", "fvgen.types", "fvgen.kernels", "fvgen.cli"])
def test_import_is_light(name):
    """Help, version and error messages must not wait for seconds of imports."""
    code = f"import sys, {name}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_files_are_short():
    kinds = {".py", ".cu", ".cuh", ".h", ".cpp"}
    folders = ("fvgen", "kernels", "csrc", "benchmarks", "tests", "tools", "_build_backend", "examples")
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in kinds]
    assert [f"{p.relative_to(ROOT)}: {n}" for p in files if (n := len(p.read_text().splitlines())) > 450] == []


def undocumented(path: Path, only: set[str] | None = None) -> list[str]:
    tree = ast.parse(path.read_text())
    missing = [] if ast.get_docstring(tree) or not tree.body else ["the module"]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and node.name != "main":
            missing += [] if ast.get_docstring(node) or (only is not None and node.name not in only) else [node.name]
    return missing


@pytest.mark.parametrize("module", [m for m in MODULES if not any(part.startswith("_") for part in m.split("."))])
def test_public_functions_have_docstrings(module):
    # operators are documented in their package; its other files follow one contract (kernels/_spec.py)
    inner = module.startswith("fvgen.kernels.") and MODULES[module].name != "__init__.py"
    assert undocumented(MODULES[module], only=set() if inner else None) == []


def read_variables(path: Path) -> set[str]:
    """Names of the environment variables that a Python file reads."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
            key = node.slice
        elif isinstance(node, ast.Call) and re.search(r"environ\.(get|pop|setdefault)$|getenv$", ast.unparse(node.func)):
            key = node.args[0]
        else:
            continue
        names.add(key.value if isinstance(key, ast.Constant) else ast.unparse(key))
    return names


def test_the_package_reads_the_environment_in_one_place():
    allowed = MODULES["fvgen.envs"]
    assert [str(p.relative_to(ROOT)) for p in MODULES.values() if p != allowed and read_variables(p)] == []


def test_every_environment_variable_is_documented():
    read: set[str] = set()
    for folder in ("fvgen", "kernels", "tests", "benchmarks", "tools", "_build_backend", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            read |= read_variables(path)
    read |= read_variables(ROOT / "setup.py")
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            read |= set(re.findall(r"getenv\(\"(\w+)\"\)", path.read_text()))
    documented = set(re.findall(r"^\| `(\w+)` ", (ROOT / "docs" / "environment.md").read_text(), re.MULTILINE))
    assert sorted(read - documented) == []
    unread = {name for name in documented - read if name.startswith("FVGEN_")}
    assert not unread, f"documented but read nowhere: {unread}"


def test_the_table_of_ranks_is_in_the_documentation():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) \| (.+?) \|", text, re.MULTILINE))
    for name, rank in RANKS.items():
        assert f"`{name.removeprefix('fvgen.')}`" in rows[str(rank)], name
