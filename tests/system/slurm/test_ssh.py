"""`offgrpo launch --ssh`: the jobs are sent to a login node through a real sshd, on this machine."""

import getpass
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.system.slurm.cluster import REPOSITORY, Cluster, free_ports
from tests.system.slurm.test_launch import LAUNCHER, Launcher, states
from tests.system.slurm.toy_chain import settings

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not LAUNCHER.exists(), reason="no .venv-launch: make install-launch"),
    pytest.mark.skipif(SSHD is None, reason="no sshd here"),
]


@pytest.fixture
def login_node(cluster: Cluster, tmp_path):
    """(port, key) of an sshd whose sessions see the cluster's Slurm, and nothing of this process's environment."""
    folder = tmp_path / "sshd"
    folder.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    Path("/run/sshd").mkdir(exist_ok=True)
    (port,) = free_ports(1)
    names = ("SLURM_CONF", "PATH", "PYTHONPATH", "PYTHONWARNINGS", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
    lines = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "authorized",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
        "PidFile": folder / "pid",
        "SetEnv": " ".join(f'"{name}={cluster.environment[name]}"' for name in names),
        # NeMo-Run copies the scripts with sftp.
        "Subsystem": "sftp internal-sftp",
    }
    (folder / "config").write_text("".join(f"{name} {value}\n" for name, value in lines.items()))
    with (folder / "log").open("w") as log:
        daemon = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "config"], stderr=log)
    try:
        yield port, folder / "user"
    finally:
        daemon.terminate()
        daemon.wait()


@pytest.fixture
def launcher(login_node, cluster, tmp_path) -> Launcher:
    """On a machine without Slurm's commands; the login node's key is known, as after a first visit."""
    port, _ = login_node
    known = tmp_path / "known_hosts"
    deadline = time.monotonic() + 20
    while not known.exists() or not known.read_text():
        assert time.monotonic() < deadline, "sshd does not answer"
        done = subprocess.run(["ssh-keyscan", "-p", str(port), "127.0.0.1"], capture_output=True, text=True)
        known.write_text(done.stdout)
    # OpenSSH reads the home of the password file, whatever HOME says.
    wrapper = tmp_path / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -o UserKnownHostsFile={known} "$@"\n')
    wrapper.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OFFGRPO_"))}
    return Launcher(tmp_path, {**kept, "PATH": f"{wrapper.parent}:{os.environ['PATH']}"})


def test_a_chain_sent_by_ssh(launcher, login_node, chain, tmp_path):
    """Success and failure, with the failed step's log fetched through the tunnel."""
    port, key = login_node
    there = ["--ssh", f"{getpass.getuser()}@127.0.0.1:{port}", "--identity", key, "--job-dir", tmp_path / "jobs"]
    there += ["--home", REPOSITORY, "--workdir", tmp_path, "--poll-seconds", "1"]
    sets = settings(chain[0], f"paths.output={tmp_path / 'out'}")
    output = launcher.launch("slurm", *there, *sets, "--steps", "plan")
    assert states(output) == {"plan": "succeeded"}, output
    assert "steps" in launcher("jobs", "logs", launcher.experiment(), "plan")

    sets = settings(chain[0], f"paths.reference={tmp_path / 'none'}", f"paths.output={tmp_path / 'out'}")
    output = launcher.launch("slurm", *there, *sets, "--steps", "plan,train", expect=1)
    assert states(output) == {"plan": "succeeded", "train": "failed"}, output
    assert "no finished reference here" in output
