#!/usr/bin/env bash
# Everything that is to be known about this code on one GPU, in under ten minutes:  bash benchmarks/gpu.sh OUT
#   1. the tests that need a GPU          2. step time, MFU, memory and a profile of ours, images and clips
#   3. ours against PyTorch, plain and compiled, at growing batches         4. the input pipeline and retrieval
# Results go to OUT as JSON and logs; every part has a time limit of its own, so a slow one does not cost the others,
# and DEADLINE (580 seconds) ends the whole.
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
  device=cpu dtype=float32 image_batches="4" video_batches="4" step_batch=4 items=16 repeats=2 seconds=0.2
  compile_limit=250 # not enough on 2 cores, even at this size
  toy=(--debug) config_toy=(--config.debug=true) tests=(--collect-only)
else
  export JAX_PLATFORMS=cuda test_platforms=cuda,cpu
  device=cuda dtype=bfloat16 image_batches="128 16 512" video_batches="64 16" step_batch=128 items=2000 repeats=5 seconds=0.5
  compile_limit=120
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

for stream in images videos; do
  config=configs/pretrain_${stream%s}.py
  # kernels inside CUDA graphs carry no names, so the profile is taken without graphs
  part "step_$stream" 75 env XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=" "$python" -m scl_jax.benchmark step \
    --config="$config" --stream="$stream" --batch="$step_batch" --repeats="$repeats" "${model[@]}" --json="$out/step_$stream.json"
done
# text and fusion have attention dropout, which cuDNN's kernels cannot draw anew at every step: what it costs
part step_without_attention_dropout 75 "$python" -m scl_jax.benchmark step --config=configs/pretrain_image.py --noprofile \
  --batch="$step_batch" --repeats="$repeats" "${model[@]}" --config.model.attention_dropout=0.0 --json="$out/step_no_dropout.json"
part gpu_tests 75 env JAX_PLATFORMS="$test_platforms" "$python" -m pytest -q -m gpu "${tests[@]}"

against_pytorch() { # against_pytorch NAME LIMIT STREAM BATCH SIDES...
  local name=$1 limit=$2 stream=$3 batch=$4
  shift 4
  part "${name}_${stream}_$batch" "$limit" "$python" benchmarks/compare.py --config="configs/pretrain_${stream%s}.py" \
    --stream="$stream" --batch="$batch" --dtype="$dtype" --device="$device" --threads=16 --repeats="$repeats" \
    --sides "$@" --one_at_a_time "${toy[@]}" --json="$out/${name}_${stream}_$batch.json"
}

for batch in $image_batches; do against_pytorch compare 80 images "$batch" ours torch; done
for batch in $video_batches; do against_pytorch compare 80 videos "$batch" ours torch; done
part input 30 "$python" -m scl_jax.benchmark input --seconds="$seconds" --json="$out/input.json"
part retrieval 60 "$python" -m scl_jax.benchmark retrieval --items="$items" --batch="$step_batch" "${model[@]}" --json="$out/retrieval.json"
# compiling takes PyTorch longest, so that it comes last, once a stream; ours at the same batch stands above
against_pytorch compiled "$compile_limit" images "${image_batches%% *}" torch_compiled
against_pytorch compiled "$compile_limit" videos "${video_batches%% *}" torch_compiled
echo "whole script: $SECONDS s" | tee -a "$out/summary.txt"
