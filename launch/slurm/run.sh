#!/usr/bin/env bash
# Trains in the allocation that it is started in, with one rank for each task. Every batch script here calls it.
#
#   run.sh [--dry-run] CONFIG JSON WORK_DIR [more words of launch/train.py]
#
# It reads from the environment: PYTHON (default: .venv/bin/python, else python3), SRUN_ARGS (more words for srun),
# CPUS_PER_TASK, MAX_RESTARTS (after a fault; default 3), TIMEOUT (seconds without progress; default 300).
set -euo pipefail
dry_run=
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
if (($# < 3)); then
  echo "run.sh: CONFIG, JSON and WORK_DIR are needed, all three; it has ${*:-none}" >&2
  exit 2
fi
config=$1 json=$2 work_dir=$3
shift 3

python=${PYTHON:-}
if [[ -z $python ]]; then if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; else python=python3; fi; fi
read -ra more <<<"${SRUN_ARGS:-}"
cpus=${CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-}} # srun does not inherit it
# restart.py runs outside the container that PYTHON may stand for, where srun is; any Python from 3.9 on will do.
command=(python3 launch/restart.py --max-restarts "${MAX_RESTARTS:-3}"
  srun --kill-on-bad-exit=1 ${cpus:+"--cpus-per-task=$cpus"} "${more[@]}"
  "$python" -u launch/train.py "$config" --deepspeed_config "$json" --work-dir "$work_dir" --resume
  --timeout "${TIMEOUT:-300}" "$@")
printf '%q ' "${command[@]}"
echo
if [[ $dry_run ]]; then exit; fi

# Slurm warns this shell alone (--signal=B:USR1@…). It passes the signal on, and the ranks save and exit with 85.
warned=
# shellcheck disable=SC2317,SC2329 # called by the trap
pass_on() {
  warned=1
  kill -s USR1 "$child"
}
trap pass_on USR1
"${command[@]}" &
child=$! code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do # a signal ends `wait`, but not the command
  code=0
  wait "$child" || code=$?
done

if ((code != 85)) && [[ $code == 0 || ! $warned ]]; then exit "$code"; fi
echo "told to leave: requeued, and goes on from the last checkpoint"
scontrol requeue "$SLURM_JOB_ID" || true
sleep 30 # Slurm ends this script here; if it may not requeue the job, RequeueExit=85 can
exit 85
