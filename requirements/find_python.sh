#!/bin/sh
# Prints the path of a Python 3.12 or 3.13 that can make environments, or says in one line what is missing.
# usage: find_python.sh [PYTHON]   with PYTHON, only that one is looked at
asked=${1:-}
if [ -z "$asked" ]; then
  versions=${PYENV_ROOT:-$HOME/.pyenv}/versions
  set -- python3.12 python3.13 python3 "$versions"/3.12.*/bin/python3 "$versions"/3.13.*/bin/python3
fi
for python in "$@"; do
  "$python" -c 'import sys, venv, ensurepip
assert (3, 12) <= sys.version_info[:2] <= (3, 13)
print(sys.executable)' 2>/dev/null && exit 0
done
if [ -n "$asked" ]; then
  found=$("$asked" --version 2>&1 | tail -n 1)
  echo "error: PYTHON: expected Python 3.12 or 3.13 with its module venv; got ${found:-nothing} from $asked" >&2
else
  echo "error: no Python 3.12 or 3.13 with its module venv here; install one (Debian, Ubuntu: apt-get install" \
    "python3.12-venv python3.12-dev) or name it: make PYTHON=/path/to/python3.12 ..." >&2
fi
exit 1
