#!/usr/bin/env bash
# Prepares a worker of a Cloud TPU: Python 3.11, gcsfuse and .venv. Again, it does nothing.
#
#   bash launch/tpu_setup.sh      DRY_RUN=1 prints what it would do
#
# The images are Ubuntu 22.04 with Python 3.10. Not tried on a TPU VM.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/code.sh

as_root() { if [ "$(id -u)" = 0 ]; then run "$@"; else run sudo "$@"; fi; }

export PYTHON=${PYTHON:-python3.11}
if ! command -v gcsfuse > /dev/null; then
  key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt
  source="deb [signed-by=$key] $url gcsfuse-$(. /etc/os-release && echo "$VERSION_CODENAME") main"
  as_root curl --fail --silent --show-error "$url/doc/apt-key.gpg" --output "$key"
  as_root sh -c "echo '$source' > /etc/apt/sources.list.d/gcsfuse.list"
fi
if ! command -v gcsfuse > /dev/null || ! command -v "$PYTHON" > /dev/null; then
  # Right after its start a VM updates itself, and holds apt's lock.
  as_root apt-get -o DPkg::Lock::Timeout=600 update
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -y \
    "$PYTHON" "$PYTHON-venv" gcsfuse git
fi
run bash launch/install.sh tpu
