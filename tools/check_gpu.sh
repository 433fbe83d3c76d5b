#!/usr/bin/env bash
# Everything that needs a GPU: tools/check_gpu.sh FOLDER. Installs fvgen with its CUDA extension into the Python it finds, runs the GPU
# tests, the C++ tests with compute-sanitizer, the demo, the held-out scores and the rasterizer's benchmark, and writes logs and figures
# to FOLDER. A part that fails does not stop the others; the exit status says whether all passed. Every part has a limit, and all of
# them together stop after SECONDS_IN_ALL (580), so that it ends in time. PYTHON chooses the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD python=${PYTHON:-python3}
mkdir -p "${1:?usage: tools/check_gpu.sh FOLDER}"
out=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export FVGEN_COMMIT=${FVGEN_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
in_all=${SECONDS_IN_ALL:-580} failed=()

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 left=$((in_all - SECONDS)) start=$SECONDS status
  shift 2
  if [ "$left" -lt 5 ]; then
    failed+=("$name")
    printf '%-14s left out: %d s are over\n' "$name" "$in_all"
    return
  fi
  timeout --kill-after=5 $((limit < left ? limit : left)) "$@" > "$out/$name.log" 2>&1
  status=$?
  [ "$status" = 0 ] || failed+=("$name")
  printf '%-14s %s after %d s\n' "$name" "$([ "$status" = 0 ] && echo passed || echo "FAILED ($status)")" $((SECONDS - start))
  tail -n 4 "$out/$name.log" | sed 's/^/    /'
}

part install 200 env FVGEN_BUILD_CUDA=1 "$python" -m pip install --no-build-isolation --no-deps .
# away from the checkout, so that the installed package is what is tested
cp -r tests benchmarks pyproject.toml csrc setup.py MANIFEST.in "$work"
cd "$work"
part doctor 30 fvgen doctor
# side by side where pytest-xdist is installed: most of the time goes into compiling
workers=$("$python" -c "import xdist" 2>/dev/null && echo "-n 8")
part tests 300 "$python" -m pytest -q -m gpu --tb=short -p no:cacheprovider $workers
part demo 60 fvgen demo --device cuda --output "$work/demo"
cmake_build() { cmake -S "$root" -B "$work/build" -DCMAKE_CUDA_ARCHITECTURES=native && cmake --build "$work/build" -j; }
export -f cmake_build && export root work
part build 120 bash -c cmake_build
part ctest 30 ctest --test-dir "$work/build" --output-on-failure
part memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 9 "$work/build/test_raster"
part racecheck 60 compute-sanitizer --tool racecheck --error-exitcode 9 "$work/build/test_raster"
# the longest last: what is measured is in the file at once, also where the time runs out
part held_out 120 "$python" -m fvgen.evaluation.heldout "$root/fvgen/assets/tiny" --device cuda --json "$out/tiny_model.json"
part rasterizer 300 fvgen bench raster --device cuda --json "$out/point_rasterizer.json" --overwrite
[ ${#failed[@]} = 0 ] || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
