#!/usr/bin/env bash
# Everything that needs a GPU: tools/check_gpu.sh FOLDER. Installs fvgen with its CUDA extension into the Python it finds, runs the GPU
# tests, the C++ tests with compute-sanitizer, the rasterizer's benchmark, the demo and the held-out scores, and writes logs and figures
# to FOLDER. A part that fails does not stop the others; the exit status says whether all passed. PYTHON chooses the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD python=${PYTHON:-python3}
mkdir -p "${1:?usage: tools/check_gpu.sh FOLDER}"
out=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export FVGEN_COMMIT=${FVGEN_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
failed=()

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  status=$?
  [ "$status" = 0 ] || failed+=("$name")
  printf '%-14s %s after %d s\n' "$name" "$([ "$status" = 0 ] && echo passed || echo "FAILED ($status)")" $((SECONDS - start))
  tail -n 4 "$out/$name.log" | sed 's/^/    /'
}

part install 300 env FVGEN_BUILD_CUDA=1 "$python" -m pip install --no-build-isolation --no-deps .
# away from the checkout, so that the installed package is what is tested
cp -r tests benchmarks pyproject.toml csrc setup.py MANIFEST.in "$work"
cd "$work"
part doctor 60 fvgen doctor
part tests 300 "$python" -m pytest -q -m gpu --tb=short -p no:cacheprovider
part demo 120 fvgen demo --device cuda --output "$work/demo"
part rasterizer 120 "$python" -m benchmarks.bench_point_rasterizer --json "$out/point_rasterizer.json"
part held_out 300 "$python" -m fvgen.evaluation.heldout "$root/fvgen/assets/tiny" --device cuda --json "$out/tiny_model.json"
cmake_build() { cmake -S "$root" -B "$work/build" -DCMAKE_CUDA_ARCHITECTURES=native && cmake --build "$work/build" -j; }
export -f cmake_build && export root work
part build 200 bash -c cmake_build
part ctest 120 ctest --test-dir "$work/build" --output-on-failure
part memcheck 120 compute-sanitizer --tool memcheck --error-exitcode 9 "$work/build/test_raster"
part racecheck 120 compute-sanitizer --tool racecheck --error-exitcode 9 "$work/build/test_raster"
[ ${#failed[@]} = 0 ] || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
