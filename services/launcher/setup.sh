#!/usr/bin/env bash
# Makes .venv with everything that `baton up` and the tests need, for the hardware there is. `make setup` runs it.
# Fast when nothing changed: the stamp in .venv names what it was made from. Settings: PYTHON=… HARDWARE=cpu|gpu
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=.venv
log=$venv/setup.log
stamp=$venv/setup.stamp
torch_version=2.13.0
torch_cpu_index=https://download.pytorch.org/whl/cpu

fail() {
    echo "setup: $*" >&2
    exit 1
}

# Runs a command with its output in the log; says what it does and, while it takes long, for how long.
step() {
    local what=$1 began=$SECONDS ticker status=0
    shift
    echo "setup: $what"
    (while sleep 10; do echo "setup: $what … $((SECONDS - began)) s"; done) &
    ticker=$!
    "$@" >>"$log" 2>&1 || status=$?
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    return $status
}

must() {
    step "$@" || {
        tail -n 20 "$log" >&2
        fail "$1 failed; the whole output is in $log"
    }
}

pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11, 3.12 or 3.13 is needed and none was found: install one, or say where it is with PYTHON=…"
}

# Asking for the local version +cpu by name can never download the CUDA build and its gigabytes.
install_cpu_torch() {
    pip install "torch==$torch_version+cpu" ||
        pip install --index-url "$torch_cpu_index" "torch==$torch_version+cpu"
}

install_for_cpu() {
    has_torch || must "installing torch $torch_version for CPUs" install_cpu_torch
    must "installing Baton with vLLM for CPUs" pip install --editable '.[cpu,local,dev]'
    # From the default index these are CUDA builds, which break the import of transformers. Serving text needs none.
    must "removing what does not match a CPU torch" pip uninstall --yes torchvision torchaudio torchcodec
}

has_torch() {
    "$venv/bin/python" - "$torch_version+cpu" <<'CODE' 2>/dev/null
import importlib.metadata, sys
sys.exit(importlib.metadata.version("torch") != sys.argv[1])
CODE
}

[ "$(uname -s)" = Linux ] || fail "Baton's engines run on Linux; here, use a container or a virtual machine"
hardware=${HARDWARE:-$(if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then echo gpu; else echo cpu; fi)}
# The folder too: scripts in .venv name it.
made_from=$({
    echo "$hardware $PWD"
    cat pyproject.toml services/launcher/setup.sh
} | sha256sum | cut -d' ' -f1)

if [ -x "$venv/bin/baton" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$made_from" ]; then
    exit 0
fi

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    "$python" -m venv "$venv" ||
        fail "$python cannot make a virtual environment: install its venv module (Debian: apt-get install python3-venv)"
fi
rm -f "$stamp"
: >"$log"
case $hardware in
cpu) install_for_cpu ;;
gpu) must "installing Baton with vLLM for GPUs" pip install --editable '.[gpu,local,dev]' ;;
*) fail "HARDWARE must be cpu or gpu, not $hardware" ;;
esac
must "checking that vLLM starts" "$venv/bin/python" -c 'import vllm'
echo "$made_from" >"$stamp"
echo "setup: done in $SECONDS s"
