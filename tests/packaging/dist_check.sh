#!/usr/bin/env bash
# Builds sdist and wheel, installs the wheel into a clean environment, and tries it with each extra by itself.
# Torch is large: the first time this takes some minutes.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$root/.venv/bin/python" -m build --outdir "$work/dist" "$root" >"$work/build.log" 2>&1 || { cat "$work/build.log" >&2; exit 1; }
wheel=$(echo "$work"/dist/*.whl)
"$root/.venv/bin/python" -m venv "$work/venv"
# Beside the script there are no sources that could be imported in the place of what was installed.
cp "$root/tests/packaging/smoke.py" "$work"
cd "$work"
pip() { venv/bin/python -m pip --disable-pip-version-check "$@"; }

pip install --quiet -c "$root/constraints.txt" "$wheel"
venv/bin/python smoke.py none
pip freeze | sort >bare.txt
for extra in hf onnx plot lightning cli; do
  pip install --quiet -c "$root/constraints.txt" "$wheel[$extra]"
  venv/bin/python smoke.py "$extra"
  # Only what this extra brought, so that the next one has to bring what it needs itself.
  pip freeze | sort | comm -13 bare.txt - | xargs venv/bin/python -m pip uninstall --quiet --yes
done
pip check
echo "$(basename "$wheel") is fit to be published"
