#!/bin/bash
# slurm/pipeline.sh RECIPE [--input FILE ...] [--benchmark FILE] [--set path=value ...] [other options of `offgrpo chain`]
#
# Submits the commands that `offgrpo chain` prints, each after those it needs, and prints the job ids. If one fails, what
# depends on it is cancelled. Account, partition and the like: SBATCH_ACCOUNT, SBATCH_PARTITION ...; further options of
# sbatch for all jobs in OFFGRPO_SBATCH, for one kind in OFFGRPO_SBATCH_PREPARE, _CONVERT, _RUN (plan and report),
# _REFERENCE, _TRAIN, _EVAL, for example OFFGRPO_SBATCH_TRAIN="--nodes=4 --time=48:00:00".
set -euo pipefail

OFFGRPO_HOME=${OFFGRPO_HOME:-$(dirname "$(dirname "$(realpath "$0")")")}
export OFFGRPO_HOME
if [[ -n ${OFFGRPO_SETUP:-} ]]; then
  # shellcheck source=/dev/null
  source "$OFFGRPO_SETUP"
fi
venv=${OFFGRPO_VENV:-$OFFGRPO_HOME/.venv}
if [[ -n ${OFFGRPO_CONTAINER_IMAGE:-} ]]; then
  mounts=$PWD:$PWD${OFFGRPO_CONTAINER_MOUNTS:+,$OFFGRPO_CONTAINER_MOUNTS}
  run=(srun --ntasks=1 "--container-image=$OFFGRPO_CONTAINER_IMAGE" "--container-mounts=$mounts"
    "--container-workdir=$PWD" python)
elif [[ -x $venv/bin/python ]]; then
  run=("$venv/bin/python")
else
  run=(python)
fi

declare -A job=()
withdraw() {
  echo "pipeline.sh: not everything could be submitted; cancelling what was" >&2
  [[ ${#job[@]} -eq 0 ]] || scancel "${job[@]}"
}

chain=$("${run[@]}" -m megatron_offgrpo.cli chain --format shell "$@")
trap withdraw ERR
while IFS=$'\t' read -r name script shards needs words; do
  # Quoted for a shell by `offgrpo chain`.
  eval "arguments=($words)"
  # Every batch file but run.sbatch puts its own command in front.
  [[ $script == run ]] || arguments=("${arguments[@]:1}")
  kind=OFFGRPO_SBATCH_${script^^}
  read -ra options <<<"${OFFGRPO_SBATCH:-} ${!kind:-}"
  options+=(--parsable "--job-name=offgrpo-$name" --kill-on-invalid-dep=yes)
  [[ $shards -eq 0 ]] || options+=("--array=0-$((shards - 1))")
  after=
  if [[ $needs != - ]]; then
    IFS=: read -ra earlier <<<"$needs"
    for one in "${earlier[@]}"; do after+=:${job[$one]}; done
    options+=("--dependency=afterok$after")
  fi
  id=$(sbatch "${options[@]}" "$OFFGRPO_HOME/slurm/$script.sbatch" "${arguments[@]}")
  job[$name]=${id%%;*}
  printf '%-20s%s%s\n' "$name" "${job[$name]}" "${after:+  after${after//:/ }}"
done <<<"$chain"
