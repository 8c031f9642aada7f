#!/usr/bin/env bash
# Trains on the NVIDIA GPUs of this machine:
#   bash launch/local_gpu.sh --config=configs/own_data.py --workdir=runs/own_data [--gpus=0,1] [--dry_run] [flags of main]
# One process uses all of them; --config.mesh.fsdp=8 splits parameters and optimizer state.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/arguments.sh

config='' workdir='' gpus=''
parse_arguments "config workdir gpus" "$@"
require_config
[[ -z $gpus ]] || require_match gpus '[0-9]+(,[0-9]+)*' "a list of numbers, such as 0,1"
$DRY_RUN || command -v nvidia-smi >/dev/null || die "no NVIDIA driver here (nvidia-smi is missing)"

visible=()
[[ -z $gpus ]] || visible=("CUDA_VISIBLE_DEVICES=$gpus")
# memory in one piece, and most of it: what is left over serves libraries that do not ask XLA
run env "${visible[@]}" JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 \
  "${TRAIN[@]}" --config="$config" --workdir="$workdir" "${REST[@]}"
