#!/bin/bash
# Stands in for Python: the real one, but on BAD_NODE storage fails.
if [ "$SLURMD_NODENAME" = "$BAD_NODE" ]; then
  exec "$REAL_PYTHON" -c '
import os, runpy, sys
def fsync(_): raise OSError(5, "Input/output error")
os.fsync = fsync
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)' "$@"
fi
exec "$REAL_PYTHON" "$@"
