#!/bin/bash
# Installs what the tests on a real Slurm need (Debian or Ubuntu, as root); elsewhere they are skipped with a reason.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
missing=()
for name in munged slurmctld slurmd sbatch sacct slurmdbd mariadbd shellcheck sshd; do
  command -v "$name" >/dev/null || missing+=("$name")
done
[[ ${#missing[@]} -gt 0 ]] || exit 0
if [[ $(id -u) -ne 0 ]] || ! command -v apt-get >/dev/null; then
  echo "tests on Slurm will be skipped: ${missing[*]} missing, and only root can install packages with apt-get here" >&2
  exit 0
fi
# The packages' own services stay off: the tests start their daemons themselves, on ports of their own.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || true
apt-get install -qq -y --no-install-recommends slurmctld slurmd slurm-client munge slurmdbd mariadb-server shellcheck \
  openssh-server openssh-client \
  >/dev/null || echo "tests on Slurm will be skipped: apt-get could not install ${missing[*]}" >&2
