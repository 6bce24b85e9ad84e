#!/usr/bin/env bash
# Makes .venv in the project's folder and installs the package there, in the versions that the tests
# ran with. Nothing needs to be active.
#   launch/setup.sh [EXTRAS]    by commas: test, parity, serve, cuda, tpu (setup.py)
# PYTHON picks the interpreter (3.11, 3.12 or 3.13), VENV another folder. Again is soon done.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3} venv=${VENV:-.venv}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "launch/setup.sh: $python is not Python 3.11 or later; PYTHON=python3.12 names another" >&2
  exit 2
fi
[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
requirements=(--requirement requirements.txt)
[[ ",${1:-}," == *,parity,* ]] && requirements+=(--requirement requirements-parity.txt)
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${requirements[@]}" \
  --editable ".${1:+[$1]}"
