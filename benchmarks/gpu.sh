#!/usr/bin/env bash
# Everything that is to be known about this code on one GPU, in under ten minutes:  bash benchmarks/gpu.sh OUT
#   1. step time, MFU, memory and a profile of ours, images and clips
#   2. PyTorch, plain and compiled, on the same shapes          3. retrieval and the input pipeline
#   4. the tests that need a GPU
# Results go to OUT as JSON and logs; every part has a time limit of its own, so a slow one does not cost the others,
# and DEADLINE (580 seconds) ends the whole.
#   AHEAD=FOLDER bash benchmarks/gpu.sh OUT   ours as compiled before, without a GPU, by benchmarks/ahead.py: any number of
#                                         batch sizes in a minute, where compiling the step on the GPU takes minutes each
#   TOY=1 bash benchmarks/gpu.sh OUT      the same at toy size on a CPU, to see that it runs; SLACK=5 DEADLINE=3000 on a busy one
# Needs the environment of requirements.txt with JAX and PyTorch for the GPU; PYTHON names its interpreter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
out=${1:?the folder for results}
python=${PYTHON:-python}
mkdir -p "$out"
deadline=${DEADLINE:-580} # seconds; what has not begun by then is left out
export PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/xla_cache}

if [[ ${TOY:-} ]]; then
  export JAX_PLATFORMS=cpu test_platforms=cpu
  export XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" # compiles sooner
  device=cpu dtype=float32 image_batch=4 video_batch=4 items=16 repeats=2 seconds=0.2
  toy=(--debug) config_toy=(--config.debug=true) tests=(--collect-only)
else
  export JAX_PLATFORMS=cuda test_platforms=cuda,cpu
  device=cuda dtype=bfloat16 image_batch=64 video_batch=16 items=2000 repeats=5 seconds=0.5
  toy=() config_toy=() tests=()
fi
model=(--config.model.dtype="$dtype" --config.model.remat=none "${config_toy[@]}")

part() { # part NAME LIMIT COMMAND...: runs it for at most LIMIT seconds, keeps what it prints, says how it ended
  local name=$1 limit=$(($2 * ${SLACK:-1})) start=$SECONDS
  shift 2
  ((limit > deadline - SECONDS)) && limit=$((deadline - SECONDS))
  ((limit < 10)) && { echo "── $name: left out, no time" | tee -a "$out/summary.txt"; return; }
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  local code=$?
  tail -n 40 "$out/$name.log"
  echo "── $name: exit $code after $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}

step() { # step STREAM BATCH
  # kernels inside CUDA graphs carry no names of scopes, so the profile is taken without graphs
  part "step_$1" 180 env XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=" "$python" -m scl_jax.benchmark step \
    --config="configs/pretrain_${1%s}.py" --stream="$1" --batch="$2" --repeats="$repeats" "${model[@]}" --json="$out/step_$1.json"
}

against_pytorch() { # against_pytorch LIMIT STREAM BATCH SIDES...
  local limit=$1 stream=$2 batch=$3
  shift 3
  part "${*: -1}_${stream}_$batch" "$limit" "$python" benchmarks/compare.py --config="configs/pretrain_${stream%s}.py" \
    --stream="$stream" --batch="$batch" --dtype="$dtype" --device="$device" --threads=16 --repeats="$repeats" \
    --sides "$@" --one_at_a_time "${toy[@]}" --json="$out/${*: -1}_${stream}_$batch.json"
}

sides=(ours)
if [[ ${AHEAD:-} ]]; then
  part ahead 200 "$python" benchmarks/ahead.py run "$AHEAD" --repeats="$repeats" --trace
  cp "$AHEAD"/*.results.json "$out"
  sides=()
else
  step images "$image_batch"
  step videos "$video_batch"
fi
against_pytorch 120 images "$image_batch" "${sides[@]}" torch
against_pytorch 120 videos "$video_batch" "${sides[@]}" torch
against_pytorch 120 images "$image_batch" torch_compiled
part input 30 "$python" -m scl_jax.benchmark input --seconds="$seconds" --json="$out/input.json"
part retrieval 60 "$python" -m scl_jax.benchmark retrieval --items="$items" --batch="$image_batch" "${model[@]}" --json="$out/retrieval.json"
part gpu_tests 150 env XLA_FLAGS= JAX_PLATFORMS="$test_platforms" "$python" -m pytest -q -m gpu "${tests[@]}"
echo "whole script: $SECONDS s" | tee -a "$out/summary.txt"
