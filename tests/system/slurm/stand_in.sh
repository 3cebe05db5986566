#!/bin/bash
# Stands in for Python: a "training" of four steps whose misfortunes the test chooses by name.
set -u
run=$(dirname "$OFFGRPO_OUTCOME")
step=$(cat "$run/saved" 2>/dev/null || echo 0)
save() { [ "$SLURM_PROCID" != 0 ] || { echo "$1" >"$run/saved" && echo "step $1 4" >"$OFFGRPO_OUTCOME"; }; }
trap 'save $((step + 1)); exit 0' USR1 TERM
save "$step"
echo "task $SLURM_PROCID on $SLURMD_NODENAME from step $step: $4"
case $4 in
crash) exit 3 ;;
slices) [ "$step" -lt 4 ] && save $((step + 1)) && exit 0 ;;
bad_node)
  # The node on which task 0 ran first.
  [ "$SLURM_PROCID" != 0 ] || [ -e "$run/bad" ] || echo "$SLURMD_NODENAME" >"$run/bad"
  while [ ! -e "$run/bad" ]; do sleep 0.1; done
  [ "$SLURMD_NODENAME" = "$(cat "$run/bad")" ] && exit 5
  ;;
refused) echo "refused plan: no finished plan here" >"$OFFGRPO_OUTCOME" && exit 1 ;;
wait) if [ "$step" -eq 0 ]; then for _ in {1..600}; do sleep 0.1; done; fi ;;
esac
save 4
