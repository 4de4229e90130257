#!/usr/bin/env bash
# Builds the CPU kernels with AddressSanitizer and UBSan in a temporary folder and runs the kernels' tests on it, once for each
# instruction set that this machine has. Any finding ends its run at once, so the script fails.
#
#     tests/sanitize.sh [python] [arguments of pytest]
#
# The tests that draw cases at random and the table of accuracies are left out: they take the same paths as the rest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")
shift || true
compiler=${CXX:-c++}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# Frames and lines for the reports; the vector loops are far too slow without optimisation.
sanitizers=-fsanitize=address,undefined,float-cast-overflow
KAFOPS_CXX_FLAGS="$sanitizers -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1" \
KAFOPS_LD_FLAGS="$sanitizers" KAFOPS_BUILD_CPU=1 KAFOPS_BUILD_CUDA=0 \
  "$python" setup.py -q build --build-base "$folder" --build-lib "$folder/lib" >"$folder/log" 2>&1 || {
    cat "$folder/log"
    exit 1
  }

# Python is not built with them, so their libraries come first; libstdc++ too, for the exceptions that pass through.
preload=""
for library in libasan.so libubsan.so libstdc++.so; do
  preload+="$(realpath "$("$compiler" -print-file-name=$library)") "
done

run() {  # instruction set, command...
  KAFOPS_CPU_CAPABILITY=$1 LD_PRELOAD=$preload PYTHONPATH=$folder/lib PYTHONSAFEPATH=1 PYTHONMALLOC=malloc \
  ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
    "$python" "${@:2}"
}

for capability in portable avx2 avx512; do
  if ! here=$(run $capability -c "import kafops; print(kafops.library())" 2>&1); then
    echo "$here" | grep -q "does not run here" || { echo "$here"; exit 1; }
    echo "$capability: not on this machine"
    continue
  fi
  [[ $here == "$folder"/* ]] || { echo "the tests would run on $here, which is not the build with sanitizers"; exit 1; }
  echo "$capability:"
  run $capability -m pytest -q -o pythonpath="$folder/lib" -p no:cacheprovider -m "not slow" -k "not drawn and not eager" "$@" \
    tests/kafops/test_kernels.py tests/kafops/test_kernels_other.py tests/kafops/test_orders.py \
    tests/kafops/test_functional.py
done
echo "no findings"
