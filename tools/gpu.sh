#!/usr/bin/env bash
# Builds for the GPU of this machine, tests the kernels on it and measures them, within 9 minutes and without a
# network: bash tools/gpu.sh [FOLDER FOR THE RESULTS]. tools/gpu.py has the parts and their budgets.
# Needs nvcc, and in Python torch (a CUDA build), ninja, pybind11, pytest, hypothesis and rich.
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}" # H100, H200; for other GPUs: native
exec "${PYTHON:-python3}" tools/gpu.py "${1:-${OUT:-results/gpu}}"
