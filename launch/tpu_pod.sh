#!/usr/bin/env bash
# A TPU slice of Google Cloud (TPU VMs) from nothing to a run, step by step; every step works on all hosts:
#   bash launch/tpu_pod.sh create  --name=scl --zone=us-west4-a --type=v5litepod-256 --version=v2-alpha-tpuv5-lite [--spot=true]
#   bash launch/tpu_pod.sh copy    --name=scl --zone=us-west4-a                 the committed files of this repository
#   bash launch/tpu_pod.sh install --name=scl --zone=us-west4-a [--prepare='sudo mount -t nfs 10.0.0.2:/share /mnt']
#   bash launch/tpu_pod.sh run     --name=scl --zone=us-west4-a --config=configs/pretrain_joint.py --workdir=/mnt/runs/joint
#   bash launch/tpu_pod.sh logs    --name=scl --zone=us-west4-a                 follows the first host's
#   bash launch/tpu_pod.sh stop    --name=scl --zone=us-west4-a                 saves and ends; `run` continues
#   bash launch/tpu_pod.sh delete  --name=scl --zone=us-west4-a
# --project=… for another project than gcloud's own, --dry_run prints the commands. Work directory and data lie on a
# file system that all hosts share, such as Filestore; --prepare is a command that mounts it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/arguments.sh

STEP=${1:-}
[[ $STEP != --help && $STEP != -h ]] || show_header
[[ $STEP =~ ^(create|copy|install|run|logs|stop|delete)$ ]] || die "name a step: create, copy, install, run, logs, stop or delete"
shift
name='' zone='' type='' version='' spot=false project='' prepare=true config='' workdir=''
parse_arguments "name zone type version spot project prepare config workdir" "$@"
require_match name '[a-z]([-a-z0-9]*[a-z0-9])?' "a name of lower-case letters, digits and hyphens"
require_match zone '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone, such as us-west4-a"
((${#REST[@]} == 0)) || [[ $STEP == run ]] || die "what is ${REST[0]}? Options of scl_jax.main belong to run"
$DRY_RUN || command -v gcloud >/dev/null || die "gcloud is missing: https://cloud.google.com/sdk/docs/install"

where=(--zone="$zone")
[[ -z $project ]] || where+=(--project="$project")
tpu() { run gcloud compute tpus tpu-vm "$@" "${where[@]}"; }
everywhere() { tpu ssh "$name" --worker=all --command="$1"; }

case $STEP in
  create)
    require type "the slice, such as v5litepod-256 or v4-256"
    require version "the software of the VM, such as v2-alpha-tpuv5-lite"
    require_match spot 'true|false' "true or false"
    options=()
    [[ $spot == false ]] || options=(--spot)
    tpu create "$name" --accelerator-type="$type" --version="$version" "${options[@]}"
    ;;
  copy)
    archive=${TMPDIR:-/tmp}/scl_jax.tar.gz
    run git archive --format=tar.gz --output="$archive" HEAD
    tpu scp "$archive" "$name:" --worker=all
    everywhere 'mkdir -p scl_jax && tar -xzf scl_jax.tar.gz -C scl_jax'
    ;;
  install)
    everywhere 'sudo apt-get -qq update && sudo apt-get -qq install -y python3.11-venv'
    everywhere 'cd scl_jax && source launch/environment.sh && ensure_environment requirements.txt && pip_install --editable ".[tpu]"'
    everywhere "$prepare"
    ;;
  run)
    require_config
    [[ $workdir == /* ]] || die "--workdir=$workdir: write the whole path, of a folder that all hosts share"
    printf -v command '%q ' .venv/bin/python -m scl_jax.main --config="$config" --workdir="$workdir" "${REST[@]}"
    # JAX finds the other hosts by the TPU's metadata; the session survives that of ssh. The braces make $! the program
    # itself: of `cd … && program &` it would be the shell around both, and `stop` would end that alone
    everywhere "cd scl_jax && { nohup setsid env JAX_PLATFORMS=tpu,cpu $command> ~/scl_jax.log 2>&1 < /dev/null & echo \$! > ~/scl_jax.pid; }"
    ;;
  logs)
    tpu ssh "$name" --worker=0 --command='tail -n 100 -F scl_jax.log'
    ;;
  stop)
    # shellcheck disable=SC2016  # the hosts fill it in
    everywhere 'kill -TERM "$(cat scl_jax.pid)"'
    ;;
  delete)
    tpu delete "$name" --quiet
    ;;
esac
