"""Packages, and the CUDA extension ``fvgen/_C.abi3.so`` where it can be built.

FVGEN_BUILD_CUDA=auto (build if PyTorch has CUDA and nvcc is found), 1 (build or fail), 0 (pure Python).
TORCH_CUDA_ARCH_LIST, for example "9.0" or "8.0;9.0+PTX", chooses the architectures; otherwise those of the GPUs that nvidia-smi
shows, otherwise the list in csrc/manifest.json.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MANIFEST = json.loads((ROOT / "csrc" / "manifest.json").read_text())


def cuda_home() -> Path | None:
    """Folder of the CUDA toolkit that has nvcc and the headers."""
    nvcc = shutil.which("nvcc")
    found = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    found += [str(Path(nvcc).resolve().parent.parent)] if nvcc else []
    for folder in [*found, "/usr/local/cuda"]:
        if folder and (Path(folder) / "include" / "cuda_runtime.h").is_file() and (nvcc or (Path(folder) / "bin/nvcc").is_file()):
            return Path(folder)
    return None


def why_no_cuda() -> str | None:
    """Reason for a pure Python install, None where the extension is to be built."""
    mode = os.environ.get("FVGEN_BUILD_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"FVGEN_BUILD_CUDA must be auto, 1 or 0, not {mode!r}")
    if mode == "0":
        return "FVGEN_BUILD_CUDA=0"
    try:
        import torch
    except ImportError:
        reason = "PyTorch is not visible to the build (install it first, or use --no-build-isolation)"
    else:
        # the build machine may have no GPU, so the toolkit and PyTorch's build decide
        if cuda_home() is None:
            reason = "no CUDA toolkit: put nvcc on PATH or set CUDA_HOME"
        elif torch.version.cuda is None and mode == "auto":
            reason = "this PyTorch has no CUDA"
        else:
            return None
    if mode == "1":
        raise SystemExit(f"FVGEN_BUILD_CUDA=1, but {reason}")
    return reason


def architecture_flags() -> list[str]:
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    names = [name for name in wanted.split(";") if name]
    if not names:
        try:
            ask = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
            shown = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=20).stdout.split()
            names = sorted({name for name in shown if name.replace(".", "").isdigit()})
        except (OSError, subprocess.SubprocessError):
            names = []
    if not names:
        names = list(MANIFEST["default_architectures"])
        names[-1] += "+PTX"
    flags = []
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildCuda(build_ext):
    """Compiles the torch-free core with nvcc and the binding with the C++ compiler, and links both."""

    def build_extension(self, ext: Extension) -> None:
        import torch

        home = cuda_home()
        assert home is not None
        torch_root = Path(torch.__file__).parent
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        temp = Path(self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        include = [f"-I{ROOT / folder}" for folder in MANIFEST["include_dirs"]]
        nvcc = str(home / "bin/nvcc") if (home / "bin/nvcc").is_file() else "nvcc"
        cxx = os.environ.get("CXX", "c++")

        commands, objects = [], []
        for source in MANIFEST["core_sources"]:
            objects.append(str(temp / (Path(source).stem + ".o")))
            flags = [*MANIFEST["nvcc_flags"], *architecture_flags(), *include]
            commands.append([nvcc, *flags, "-c", str(ROOT / source), "-o", objects[-1]])
        for source in MANIFEST["torch_sources"]:
            objects.append(str(temp / (Path(source).stem + ".o")))
            flags = [*MANIFEST["torch_flags"], *(f"-D{name}" for name in MANIFEST["torch_defines"]), *include]
            flags += ["-isystem", str(torch_root / "include"), "-isystem", str(home / "include")]
            commands.append([cxx, *flags, "-c", str(ROOT / source), "-o", objects[-1]])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._run, commands))
        folders = [home / name for name in ("lib64", "lib", "targets/x86_64-linux/lib") if (home / name).is_dir()]
        static = any((folder / "libcudart_static.a").is_file() for folder in folders)
        libraries = [f"-L{folder}" for folder in folders]
        libraries += ["-lcudart_static" if static else "-lcudart", "-lrt", "-ldl", "-lpthread"]
        libraries += [f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
        self._run([cxx, "-shared", *objects, *libraries, "-o", str(out)])

    def _run(self, command: list[str]) -> None:
        print(" ".join(command), flush=True)
        if subprocess.run(command).returncode:
            raise SystemExit(f"{command[0]} failed on {command[-3]}; FVGEN_BUILD_CUDA=0 installs without the CUDA extension")


packages = find_packages(include=["fvgen", "fvgen.*"])
packages += ["fvgen.kernels", *(f"fvgen.kernels.{name}" for name in find_packages("kernels"))]

reason = why_no_cuda()
extensions, options = [], {}
if reason is None:
    extensions = [Extension("fvgen._C", [*MANIFEST["core_sources"], *MANIFEST["torch_sources"]], py_limited_api=True)]
    options = {"bdist_wheel": {"py_limited_api": "cp311"}}
elif not {"egg_info", "dist_info", "sdist"} & set(sys.argv):
    print(f"fvgen: pure Python install, without the CUDA extension: {reason}", file=sys.stderr)

setup(
    packages=packages,
    package_dir={"fvgen": "fvgen", "fvgen.kernels": "kernels"},
    package_data={"fvgen": ["assets/**/*", "**/*.json", "**/*.safetensors"], "fvgen.kernels": ["*/README.md"]},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildCuda},
    options=options,
)
