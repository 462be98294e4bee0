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
command=(srun --kill-on-bad-exit=1 ${cpus:+"--cpus-per-task=$cpus"} "${more[@]}"
  "$python" -u launch/train.py "$config" --deepspeed_config "$json" --work-dir "$work_dir" --resume
  --timeout "${TIMEOUT:-300}" "$@")
printf '%q ' "${command[@]}"
echo
if [[ $dry_run ]]; then exit; fi

# Slurm warns this shell alone (--signal=B:USR1@…), which passes it on to the ranks: they save and leave with 85.
warned=
# shellcheck disable=SC2317,SC2329 # called by the trap
pass_on() {
  warned=1
  scancel --signal=USR1 "$SLURM_JOB_ID"
}
trap pass_on USR1
"${command[@]}" &
code=0
wait $! || code=$?
while kill -0 $! 2>/dev/null; do # a signal ends `wait`, not srun
  code=0
  wait $! || code=$?
done

counter=$work_dir/slurm-$SLURM_JOB_ID.restarts # Slurm's own count includes the times that it wanted the node
restarts=$(cat "$counter" 2>/dev/null || echo 0)
if ((code == 85)) || [[ $code != 0 && $warned ]]; then
  why="told to leave"
elif ((code > 2)) && ((restarts < ${MAX_RESTARTS:-3})); then # 1 and 2 would come again
  why="code $code, restart $((restarts + 1)) of ${MAX_RESTARTS:-3}"
  echo $((restarts + 1)) >"$counter"
else
  exit "$code"
fi
echo "$why: requeued, and goes on from the last checkpoint"
scontrol requeue "$SLURM_JOB_ID" || true
sleep 30 # Slurm ends this script; where it could not, RequeueExit=85 may
exit 85
