#!/usr/bin/env bash
# The body of every batch script here: trains, in the allocation that it finds itself in, with one rank per task.
#
#   run.sh [--dry-run] CONFIG JSON WORK_DIR [more words of launch/train.py]
#
# Read from the environment: PYTHON (default: .venv/bin/python, else python3), SRUN_ARGS (more words for srun),
# CPUS_PER_TASK, MAX_RESTARTS (after a fault; default 3), TIMEOUT (seconds without progress; default 300).
set -euo pipefail
dry_run=
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
config=$1 json=$2 work_dir=$3
shift 3

python=${PYTHON:-}
if [[ -z $python ]]; then if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; else python=python3; fi; fi
read -ra more <<<"${SRUN_ARGS:-}"
cpus=${CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-}} # a step does not inherit it
# PYTHON may be one inside a container, where there is no srun: what starts it again is any Python 3.9 or newer.
command=(python3 launch/restart.py --max-restarts "${MAX_RESTARTS:-3}"
  srun --kill-on-bad-exit=1 ${cpus:+"--cpus-per-task=$cpus"} "${more[@]}"
  "$python" -u launch/train.py "$config" --deepspeed_config "$json" --work-dir "$work_dir" --resume
  --timeout "${TIMEOUT:-300}" "$@")
printf '%q ' "${command[@]}"
echo
if [[ $dry_run ]]; then exit; fi

# Slurm warns this shell alone (--signal=B:USR1@…), which passes it on: the ranks save and leave with 85.
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
while kill -0 "$child" 2>/dev/null; do # a signal ends `wait`, not the command
  code=0
  wait "$child" || code=$?
done

if ((code != 85)) && [[ $code == 0 || ! $warned ]]; then exit "$code"; fi
echo "told to leave: requeued, and goes on from the last checkpoint"
scontrol requeue "$SLURM_JOB_ID" || true
sleep 30 # Slurm ends this script; where it could not, RequeueExit=85 may
exit 85
