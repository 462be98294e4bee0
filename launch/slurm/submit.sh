#!/usr/bin/env bash
# Submits a batch script with the size that OpenMMLab's variables ask for; by default that of the script's own header.
#
#   [GPUS=16] [GPUS_PER_NODE=8] [CPUS_PER_TASK=8] [SRUN_ARGS=…] submit.sh [--dry-run] [SBATCH_OPTION…] SCRIPT [WORDS…]
#
# Prints the number of the job. With --dry-run it prints the sbatch command and what the script would run.
set -euo pipefail
dry_run=
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
words=("$@") # of which the first that ends with .sbatch is the script
while (($#)) && [[ $1 != *.sbatch ]]; do shift; done
if ! (($#)); then
  echo "submit.sh: none of its words ends with .sbatch; give the batch script, such as launch/slurm/pretrain_core.sbatch" >&2
  exit 2
fi

options=()
for name in GPUS GPUS_PER_NODE; do
  if [[ ${!name:-} && ! ${!name} =~ ^[1-9][0-9]{0,5}$ ]]; then
    echo "submit.sh: $name is ${!name}; it is a whole number, at least 1" >&2
    exit 2
  fi
done
if [[ ${GPUS:-} ]]; then
  per_node=${GPUS_PER_NODE:-8}
  if ((GPUS < per_node)); then per_node=$GPUS; fi
  if ((GPUS % per_node)); then
    echo "submit.sh: GPUS $GPUS is not a multiple of GPUS_PER_NODE $per_node; change either" >&2
    exit 2
  fi
  options+=("--nodes=$((GPUS / per_node))" "--ntasks-per-node=$per_node" "--gpus-per-node=$per_node")
elif [[ ${GPUS_PER_NODE:-} ]]; then
  options+=("--ntasks-per-node=$GPUS_PER_NODE" "--gpus-per-node=$GPUS_PER_NODE")
fi
if [[ ${CPUS_PER_TASK:-} ]]; then options+=("--cpus-per-task=$CPUS_PER_TASK"); fi
command=(sbatch --parsable "${options[@]}" "${words[@]}") # of an option that comes twice, Slurm takes the last
if [[ $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  bash "$1" --dry-run "${@:2}"
else
  "${command[@]}"
fi
