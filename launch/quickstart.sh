#!/usr/bin/env bash
# From nothing to an evaluated model on a laptop:  bash launch/quickstart.sh
# Sets up .venv, makes the toy world, pre-trains on its images and clips, evaluates. 5 to 15 minutes on 2 CPU cores.
# WORKDIR=… and DATA=… choose other folders; further arguments go to the training command (--config.train.steps=100).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
  sed -n '2,/^set /s/^# //p' launch/quickstart.sh # the lines above
  exit
fi
source launch/environment.sh

DATA=${DATA:-data}
WORKDIR=${WORKDIR:-runs/quickstart}

ensure_environment requirements.txt
# shellcheck disable=SC1091
source .venv/bin/activate

# images and clips at once, one core each; then the tokenizer from the captions of both
python -m scl_jax.data.prepare --dataset=toy_world/images --out="$DATA" &
images=$!
python -m scl_jax.data.prepare --dataset=toy_world/videos --out="$DATA"
wait "$images"
python -m scl_jax.data.prepare --dataset=toy_world --out="$DATA" --train_tokenizer="$DATA/tokenizer"

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} # do not look for a TPU where launch/test.sh has installed its compiler
# memory in pages of 2 MB: less of a step's time goes into finding and clearing them (benchmarks/RESULTS.md, "A run")
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
# the many small programs of this run compile a quarter faster without the compiler's dearest passes
export XLA_FLAGS=${XLA_FLAGS:---xla_llvm_disable_expensive_passes=true}
python -m scl_jax.main --config=configs/quickstart.py --config.data.dir="$DATA" --workdir="$WORKDIR" "$@"

cat <<END

Done. In $WORKDIR:
  results.json          the table above
  metrics.jsonl         every logged number (tensorboard --logdir $WORKDIR shows them too)
  loss_curves.png       one panel an objective
  retrieval_*.png       what held-out captions find, and what held-out scenes find
  checkpoints/          restart with the same command; it continues from here
END
