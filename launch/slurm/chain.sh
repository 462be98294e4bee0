#!/usr/bin/env bash
# Runs a pipeline as a chain of jobs: upstream pretraining, intermediate finetuning of the residuals (`-`: none),
# downstream finetuning. Each job starts when the one before has succeeded, with that one's weights as its core.
#
#   chain.sh [--dry-run] WORK_DIR CORE_CONFIG INTERMEDIATE_CONFIG|- DOWNSTREAM_CONFIG
#
# Prints the numbers of the jobs. GPUS and GPUS_PER_NODE set the size of the first stage; the others have one node. With
# GPUS=8 the Swin-T and CvT-13 cores have the images of a step that they were published with.
set -euo pipefail
dry_run=()
if [[ ${1:-} == --dry-run ]]; then dry_run=(--dry-run); shift; fi
if (($# != 4)); then
  echo "usage: chain.sh [--dry-run] WORK_DIR CORE_CONFIG INTERMEDIATE_CONFIG|- DOWNSTREAM_CONFIG" >&2
  exit 2
fi
work_dir=$1 core=$2 intermediate=$3 downstream=$4
slurm=launch/slurm previous=

stage() { # NAME SCRIPT CONFIG JSON [more words of launch/train.py]
  local after=()
  if [[ $previous ]]; then after=("--dependency=afterok:$previous" --kill-on-invalid-dep=yes); fi
  local job
  job=$(bash "$slurm/submit.sh" "${dry_run[@]}" "--job-name=$1" "${after[@]}" "$2" "$3" "$4" "$work_dir/$1" "${@:5}")
  echo "$job"
  previous=${job%%;*}
  if [[ ${dry_run[*]} ]]; then previous=JOB_OF_$1; fi
}

stage core "$slurm/pretrain_core.sbatch" "$core" ds_configs/zero1.json
unset GPUS GPUS_PER_NODE
from=$work_dir/core
if [[ $intermediate != - ]]; then
  stage intermediate "$slurm/finetune_residual.sbatch" "$intermediate" ds_configs/zero2.json \
    --cfg-options "model.core=$from"
  from=$work_dir/intermediate
fi
stage downstream "$slurm/finetune_residual.sbatch" "$downstream" ds_configs/zero2.json \
  --cfg-options "model.backbone.core=$from"
