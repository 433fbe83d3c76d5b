#!/usr/bin/env bash
# Makes a virtual environment with fvgen in editable mode and everything for development: tools/setup_venv.sh FOLDER
# PYTHON chooses the interpreter; otherwise the first of those below that runs. An existing environment is kept and updated.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
export PIP_DISABLE_PIP_VERSION_CHECK=1

suits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

if [ ! -x "$venv/bin/python" ]; then
  found=
  for python in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
    if suits "$python"; then found=$python && break; fi
  done
  if [ -z "$found" ]; then
    echo "fvgen needs Python 3.11, 3.12 or 3.13 with venv (Debian and Ubuntu: apt install python3-venv);" \
      "PYTHON=/path/to/python names one" >&2
    exit 1
  fi
  echo "Making $venv with $("$found" --version)"
  "$found" -m venv "$venv"
fi

# The build's own requirements and PyTorch first: the CUDA extension has to be compiled against the PyTorch it will run with.
"$venv/bin/python" - > "$venv/first.txt" <<'PY'
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))
needed = [*project["build-system"]["requires"], *(d for d in project["project"]["dependencies"] if d.startswith("torch"))]
print("\n".join(needed))
PY
echo "Installing into $venv (about a minute with packages at hand, longer where they have to be downloaded)"
# modules are compiled when they are first imported: most never are
"$venv/bin/python" -m pip install -q --no-compile -r "$venv/first.txt"
"$venv/bin/python" -m pip install -q --no-compile --no-build-isolation -e ".[dev]"
