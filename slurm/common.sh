# shellcheck shell=bash
# Sourced by the batch scripts. Settings come from sbatch's own options and SBATCH_* variables, and from these:
#
#   OFFGRPO_HOME              checkout; by default the folder that sbatch was called in
#   OFFGRPO_VENV              virtual environment; by default $OFFGRPO_HOME/.venv where there is one
#   OFFGRPO_SETUP             shell file sourced first (module load ..., export NCCL_...)
#   OFFGRPO_CONTAINER_IMAGE   run the tasks in this image (pyxis/enroot)
#   OFFGRPO_CONTAINER_MOUNTS  further mounts, a:b,c:d; the working and log folders are always mounted
#   OFFGRPO_SRUN_ARGS         further arguments of srun, separated by blanks
#   OFFGRPO_LOGS              folder of the logs (logs)
#   OFFGRPO_ATTEMPTS          attempts in a row without progress after which a job is given up (3)
#   OFFGRPO_SHARDS            shards of prepare and eval where the array has only some of them
#
# Each attempt of a job writes $OFFGRPO_LOGS/NAME-JOBID/attempt-N.log; all attempts of a job share that folder.
set -uo pipefail

OFFGRPO_HOME=${OFFGRPO_HOME:-$SLURM_SUBMIT_DIR}
if [[ -n ${OFFGRPO_SETUP:-} ]]; then
  # shellcheck source=/dev/null
  source "$OFFGRPO_SETUP"
fi

offgrpo_folder=$(realpath -m "${OFFGRPO_LOGS:-logs}")/$SLURM_JOB_NAME-$SLURM_JOB_ID
offgrpo_attempt=$((${SLURM_RESTART_COUNT:-0} + 1))
offgrpo_log=$offgrpo_folder/attempt-$offgrpo_attempt.log
export OFFGRPO_OUTCOME=$offgrpo_folder/outcome
mkdir -p "$offgrpo_folder"
# srun no longer takes this over from sbatch by itself.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# A node's ranks share its cores; torchrun's default, where sbatch was not told otherwise.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

offgrpo_say() { echo "[$(date '+%F %T')] attempt $offgrpo_attempt: $*"; }

# The Python of the tasks.
offgrpo_python() {
  if [[ -n ${OFFGRPO_CONTAINER_IMAGE:-} ]]; then
    echo python
  elif [[ -n ${OFFGRPO_VENV:-} ]]; then
    echo "$OFFGRPO_VENV/bin/python"
  elif [[ -x $OFFGRPO_HOME/.venv/bin/python ]]; then
    echo "$OFFGRPO_HOME/.venv/bin/python"
  else
    echo python
  fi
}

# offgrpo_srun ARGUMENTS...: srun, in the container where one is set.
offgrpo_srun() {
  local flags=() extra=()
  if [[ -n ${OFFGRPO_CONTAINER_IMAGE:-} ]]; then
    flags+=("--container-image=$OFFGRPO_CONTAINER_IMAGE" "--container-workdir=$PWD")
    flags+=("--container-mounts=$PWD:$PWD,$offgrpo_folder:$offgrpo_folder${OFFGRPO_CONTAINER_MOUNTS:+,$OFFGRPO_CONTAINER_MOUNTS}")
  fi
  read -ra extra <<<"${OFFGRPO_SRUN_ARGS:-}"
  srun "${flags[@]}" "${extra[@]}" "$@"
}

# offgrpo_job COMMAND [ARGUMENTS]: `offgrpo COMMAND ARGUMENTS`, once per task of this job.
offgrpo_job() {
  local label=()
  [[ ${SLURM_NTASKS:-1} -eq 1 ]] || label=(--label)
  offgrpo_say "$SLURM_JOB_NODELIST: offgrpo $*; log $offgrpo_log"
  offgrpo_supervise offgrpo_srun --kill-on-bad-exit=1 --open-mode=append --output="$offgrpo_log" "${label[@]}" \
    "$(offgrpo_python)" -m megatron_offgrpo.cli "$@"
}

# offgrpo_shard: the arguments that give this task of an array its share of the work.
offgrpo_shard() {
  [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || return 0
  if [[ -n ${OFFGRPO_SHARDS:-} ]]; then
    echo "--shard $SLURM_ARRAY_TASK_ID/$OFFGRPO_SHARDS"
  else
    # shellcheck disable=SC2153 # set by Slurm
    echo "--shard $((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT"
  fi
}

# offgrpo_supervise COMMAND...: runs a job step, passes signals on, and queues the job again where that can help.
# Leaves the script: with status 0 when the work is done, else with the status of the failure.
offgrpo_supervise() {
  local before status step srun
  before=$(offgrpo_step)
  offgrpo_stop=
  trap 'offgrpo_pass_on USR1' USR1
  trap 'offgrpo_pass_on TERM' TERM
  # In the background: bash runs a trap only when the command in the foreground has ended.
  "$@" 2> >(tee -a "$offgrpo_folder/srun-$offgrpo_attempt.log" >&2) &
  srun=$!
  wait "$srun"
  status=$?
  while kill -0 "$srun" 2>/dev/null; do
    wait "$srun"
    status=$?
  done
  step=$(offgrpo_step)
  if offgrpo_is_done "$status"; then
    offgrpo_say "done"
    exit 0
  fi
  offgrpo_explain "$status"
  if [[ $(offgrpo_outcome) == refused* ]] || offgrpo_is_cancelled; then
    exit $((status ? status : 1))
  fi
  offgrpo_count "$before" "$step" "$status"
  offgrpo_requeue "$status"
}

offgrpo_pass_on() {
  offgrpo_stop=$1
  offgrpo_say "SIG$1: the tasks save and stop"
  # To the tasks alone; the batch script has it already.
  scancel --signal=USR1 "$SLURM_JOB_ID"
}

offgrpo_outcome() { [[ ! -e $OFFGRPO_OUTCOME ]] || cat "$OFFGRPO_OUTCOME"; }

# The last saved step, 0 where nothing was saved or the command counts no steps.
offgrpo_step() {
  local word step
  read -r word step _ < <(offgrpo_outcome; echo)
  if [[ $word == step ]]; then echo "$step"; else echo 0; fi
}

# Training that was stopped by a signal has saved and ends with status 0, before its last step.
offgrpo_is_done() {
  local word step total
  read -r word step total < <(offgrpo_outcome; echo)
  [[ $1 -eq 0 ]] && [[ $word != step || $step -eq $total ]]
}

# offgrpo_field NAME: what Slurm says of this job.
offgrpo_field() { scontrol show job -o "$SLURM_JOB_ID" | sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }

# By its user: Slurm ends the job, but not because its time is over.
offgrpo_is_cancelled() {
  [[ $(offgrpo_field JobState) == @(CANCELLED|COMPLETING) && $(offgrpo_field Reason) != TimeLimit ]]
}

offgrpo_explain() {
  local outcome
  outcome=$(offgrpo_outcome)
  if [[ $outcome == refused* ]]; then
    offgrpo_say "error: ${outcome#refused }"
  elif [[ -n $offgrpo_stop || $1 -eq 0 ]]; then
    offgrpo_say "stopped by a signal; saved: ${outcome:-nothing}"
  else
    offgrpo_say "failed with status $1; saved: ${outcome:-nothing}; last lines:"
    [[ ! -e $offgrpo_log ]] || tail -n 20 "$offgrpo_log"
  fi
}

# offgrpo_count BEFORE NOW STATUS: gives up after too many attempts in a row that saved nothing new.
offgrpo_count() {
  local file=$offgrpo_folder/attempts-without-progress count=0 limit=${OFFGRPO_ATTEMPTS:-3}
  [[ ! -e $file ]] || count=$(<"$file")
  if [[ $2 -gt $1 ]]; then count=0; else count=$((count + 1)); fi
  echo "$count" >"$file"
  if [[ $count -ge $limit ]]; then
    offgrpo_say "given up: $count attempts in a row without progress (OFFGRPO_ATTEMPTS=$limit)"
    exit $(($3 ? $3 : 1))
  fi
}

# Nodes that failed: those Slurm no longer trusts and, after a crash, the one whose task ended first.
offgrpo_bad_nodes() {
  sinfo --noheader --Node --nodes="$SLURM_JOB_NODELIST" --states=down,drain,drained,draining,fail,no_respond \
    --format=%N | sort -u
  if [[ -z $offgrpo_stop && $1 -ne 0 ]]; then
    sed -n 's/^srun: error: \([^ :]*\): tasks\{0,1\} .*/\1/p' "$offgrpo_folder/srun-$offgrpo_attempt.log" | head -n 1
  fi
}

# offgrpo_requeue STATUS: the same job waits again, without the nodes that failed if enough others are there.
offgrpo_requeue() {
  local bad old usable
  old=$(offgrpo_field ExcNodeList)
  [[ $old != "(null)" ]] || old=
  bad=$( { offgrpo_bad_nodes "$1"; [[ -z $old ]] || scontrol show hostnames "$old"; } | sort -u)
  usable=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --states=idle,allocated,mixed,completing --format=%N |
    sort -u | grep -cvxF -e "${bad:-no node}")
  # Slurm ends this script and all it calls as soon as the job is queued; the update below must still be made.
  trap '' TERM
  if ! scontrol requeue "$SLURM_JOB_ID"; then
    offgrpo_say "Slurm does not queue this job again; submit it once more to go on"
    exit $(($1 ? $1 : 1))
  fi
  # Only a pending job takes a new list; this one pends since the line above, and starts when this script has ended.
  if [[ -n $bad && $usable -ge $SLURM_JOB_NUM_NODES ]]; then
    scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$(paste -sd, <<<"$bad")"
    offgrpo_say "queued again without ${bad//$'\n'/ }"
  else
    offgrpo_say "queued again${bad:+; too few nodes to leave out ${bad//$'\n'/ }}"
  fi
  exit 0
}
