#!/usr/bin/env bash
# Writes the lock files that the images are built from: every package of a target, its exact version and its hashes.
# Needs uv. What is locked already stays as it is; pass --upgrade for newer versions. Where the default index has no CPU
# build of torch: UV_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu UV_INDEX_STRATEGY=unsafe-best-match
set -euo pipefail
cd "$(dirname "$0")/.."

# Nothing that names an index: whoever builds says where packages come from.
lock() {
    uv pip compile --quiet --generate-hashes --no-annotate --no-header --no-emit-index-url --no-emit-find-links \
        --python-version 3.11 --python-platform x86_64-manylinux_2_31 "$@"
}

lock pyproject.toml --output-file requirements/base.lock "$@"
# From the default index these three are CUDA builds, which break the import of transformers; serving text needs none.
# And a gigabyte of Triton is for GPUs: vLLM turns it off here, xgrammar looks whether it is there.
lock pyproject.toml --extra cpu --output-file requirements/cpu.lock --no-emit-package torchvision \
    --no-emit-package torchaudio --no-emit-package torchcodec --no-emit-package triton "$@"
# torch in a file of its own: it may have to come from another index.
awk '/^[a-z]/ { file = /^torch==/ ? "requirements/torch-cpu.lock" : "requirements/cpu.lock.rest" } { print > file }' \
    requirements/cpu.lock
mv requirements/cpu.lock.rest requirements/cpu.lock
lock pyproject.toml --extra gpu --output-file requirements/cuda.lock "$@"
sed -n 's/^requires = \["\(.*\)"\]$/\1/p' pyproject.toml | lock - --output-file requirements/build.lock "$@"
