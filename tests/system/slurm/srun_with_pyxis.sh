#!/bin/bash
# Stands in for srun with pyxis: notes the options of the container, and runs the command outside of one.
kept=()
for word; do
  case $word in
  --container-*) echo "$word" >>"$CONTAINER_NOTES" ;;
  *) kept+=("$word") ;;
  esac
done
exec "$REAL_SRUN" "${kept[@]}"
