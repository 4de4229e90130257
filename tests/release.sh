#!/usr/bin/env bash
# Checks what a release would publish: a source distribution, the wheel built from it (and from nothing of the working tree),
# their metadata, and that wheel installed in fresh environments at two corners of what is supported.
#
#     tests/release.sh [python with build and twine]
#
# CORNERS="3.10:2.10 3.13:" are versions of Python (as python3.10 on the path) and of torch, the newest where none is given.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")
export VIRTUAL_ENV=$("$python" -c "import sys; print(sys.prefix)")  # whose torch the wheel is built with
corners=${CORNERS:-3.10:2.10 3.13:}
for corner in $corners; do  # before what takes minutes
  "python${corner%%:*}" --version >/dev/null || { echo "python${corner%%:*} does not run: install it, or name others in CORNERS"; exit 1; }
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

rm -rf dist
"$python" -m build --sdist --outdir dist .
tar -xzf dist/*.tar.gz -C "$folder"
(cd "$folder"/kafops-* && "$python" -m build --wheel --outdir "$folder/dist" .)
cp "$folder"/dist/*.whl dist/
"$python" -m twine check --strict dist/*

for corner in $corners; do
  echo "== Python ${corner%%:*}, torch ${corner#*:}"
  environment=$folder/${corner%%:*}
  "python${corner%%:*}" -m venv "$environment"
  wanted=torch${corner#*:}
  [ "$wanted" = torch ] || wanted="torch==${corner#*:}.*"
  "$environment/bin/pip" install --quiet --disable-pip-version-check "$wanted" numpy
  start=$(date +%s)
  "$environment/bin/pip" install --quiet --disable-pip-version-check dist/*.whl
  echo "the wheel was installed in $(($(date +%s) - start)) s"
  # From a folder in which no source lies: what is imported is what was installed.
  cd "$folder"
  "$environment/bin/python" -m kafops
  "$environment/bin/python" -m kafops.check
  "$environment/bin/python" - <<'PROGRAM'
import pathlib, sys
import torch, kafops

assert pathlib.Path(kafops.__file__).is_relative_to(sys.prefix), kafops.__file__
x = torch.randn(8, 64, 32, 32, requires_grad=True)
layer = kafops.KAF2d(64, init="silu")
layer(x).sum().backward()
assert layer.alpha.grad.shape == (64, 20) and x.grad.isfinite().all()
print(kafops.backends.explain(x))
PROGRAM
  cd - >/dev/null
done
