#!/usr/bin/env bash
# Trains on a TPU slice of a Kubernetes cluster with JobSet (GKE): fills launch/jobset.yaml in and applies it.
#   bash launch/kubernetes.sh --name=scl --image=REGISTRY/scl_jax:1 --accelerator=tpu-v5-lite-podslice --topology=16x16 \
#       --hosts=64 --chips=4 --volume=shared --config=configs/pretrain_joint.py --workdir=/shared/runs/joint [--dry_run]
# hosts × chips (of one host) make up the topology. The image holds this repository as its working folder, installed
# with the extra [tpu]; --volume is a claim that all pods share (ReadWriteMany), mounted at /shared.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/arguments.sh

# shellcheck disable=SC2034  # "fill" reads them by name
name='' image='' accelerator='' topology='' hosts='' chips=4 volume='' config='' workdir=''
parse_arguments "name image accelerator topology hosts chips volume config workdir" "$@"
require_match name '[a-z]([-a-z0-9]{0,30}[a-z0-9])?' "a name of lower-case letters, digits and hyphens"
require_match image '[A-Za-z0-9][A-Za-z0-9._/:@-]*' "an image"
require_match accelerator 'tpu-[a-z0-9-]+' "a kind of TPU node, such as tpu-v5-lite-podslice"
require_match topology '[0-9]+(x[0-9]+){1,2}' "a topology, such as 16x16"
require_match hosts '[1-9][0-9]*' "a number of hosts"
require_match chips '[1-9][0-9]*' "the chips of a host"
require_match volume '[a-z0-9]([-a-z0-9.]*[a-z0-9])?' "the name of a persistent volume claim"
((hosts * chips == ${topology//x/*})) || die "--hosts=$hosts × --chips=$chips is not the $((${topology//x/*})) chips of --topology=$topology"
require_config
[[ $workdir == /shared/* ]] || die "--workdir=$workdir must lie in /shared, where the volume is mounted"
$DRY_RUN || command -v kubectl >/dev/null || die "kubectl is missing"

arguments="\"--config=$config\", \"--workdir=$workdir\""
for argument in "${REST[@]}"; do
  [[ $argument != *[\"\\]* ]] || die "$argument: quotes and backslashes cannot be passed on"
  arguments+=", \"$argument\""
done

fill() { # the values of the template, each as often as it occurs
  local text
  text=$(<launch/jobset.yaml)
  for key in name image accelerator topology hosts chips volume arguments; do
    text=${text//\$\{$key\}/"${!key}"} # quoted: bash 5.2 would put the pattern in place of an "&"
  done
  echo "$text"
}

if $DRY_RUN; then
  echo "kubectl apply -f - <<'JOBSET'"
  fill
  echo JOBSET
else
  fill | kubectl apply -f -
fi
