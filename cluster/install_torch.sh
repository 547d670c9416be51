#!/usr/bin/env bash
# Install the pinned torch: from the default index where a GPU wants CUDA or where that build is a CPU build, else from PyTorch's CPU
# index, falling back to the default index when that cannot be reached. Needs BIN, TORCH; TORCH_INDEX may be empty.
set -euo pipefail
pip() { "$BIN/python" -m pip "$@"; }

if "$BIN/python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$TORCH')" 2>/dev/null; then
  exit 0
fi
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
  pip install --quiet "torch==$TORCH"
  exit 0
fi
# A local CPU build satisfies the pin and is small; the registry's CUDA build lists nvidia packages as requirements.
plan=$(pip install --quiet --dry-run --ignore-installed --report - "torch==$TORCH" 2>/dev/null || true)
if [ -n "$plan" ] && ! grep -qE '"name": "(nvidia|cuda)-' <<<"$plan"; then
  pip install --quiet "torch==$TORCH"
elif [ -n "$TORCH_INDEX" ] && pip install --quiet --retries 1 --timeout 20 "torch==$TORCH" --index-url "$TORCH_INDEX"; then
  :
else
  echo "The CPU index ${TORCH_INDEX:-(none)} gave no torch $TORCH; taking the default build, which brings CUDA packages." >&2
  pip install --quiet "torch==$TORCH"
fi
