"""A real Slurm on this host for tests: several nodes with fake GPUs, in a folder and on ports of its own."""

import getpass
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sacct", "slurmdbd", "mariadbd")
GPUS_PER_NODE = 2
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE")


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]


def free_ports(number: int) -> list[int]:
    """Ports that the kernel gives to nobody by itself: the daemons take them some seconds later."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [*range(10_000, low), *range(high + 1, 65_536)]
    random.shuffle(ports)
    with ExitStack() as stack:
        found: list[int] = []
        while len(found) < number:
            one, port = stack.enter_context(socket.socket()), ports.pop()
            with suppress(OSError):
                one.bind(("127.0.0.1", port))
                found.append(port)
        return found


class Cluster:
    """Starts on entering, ends on leaving; also ends when this process is killed."""

    def __init__(self, nodes: int = 3) -> None:
        # Names that resolve: the head node's name is where the ranks meet.
        self.nodes = [f"127.0.0.{number + 1}" for number in range(nodes)]
        # Short: the path of munge's socket must fit into 108 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        outer = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "OFFGRPO_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
        self.environment = {
            **kept,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": SEARCH,
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONWARNINGS": "ignore",
            "OFFGRPO_HOME": str(REPOSITORY),
            "OFFGRPO_VENV": sys.prefix,
        }

    def __enter__(self) -> "Cluster":
        try:
            self._write()
            with (self.folder / "log" / "daemons.out").open("wb") as log:
                self.keeper = subprocess.Popen(
                    [sys.executable, "-m", "tests.system.slurm.daemons", str(self.folder)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=self.environment,
                    cwd=REPOSITORY,
                    start_new_session=True,
                )
            self._wait_until_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "keeper"):
            self.keeper.stdin.close()
            try:
                self.keeper.wait(60)
            except subprocess.TimeoutExpired:
                self.keeper.send_signal(signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: object, environment: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """Standard output of a command with this cluster's environment; fails with both outputs."""
        done = subprocess.run(
            [str(part) for part in command],
            env={**self.environment, **(environment or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, *arguments: object, cwd: Path, **environment: str) -> str:
        """Submits, and returns the job's id."""
        return self.run("sbatch", "--parsable", *arguments, environment=environment, cwd=cwd).strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of a job."""
        text = self.run("scontrol", "show", "job", "-o", job)
        return dict(word.split("=", 1) for word in text.splitlines()[0].split() if "=" in word)

    def wait(self, job: str, seconds: float = 300) -> dict[str, str]:
        """Waits for the end of a job and returns what Slurm says of it."""
        deadline = time.monotonic() + seconds
        while (found := self.job(job))["JobState"] not in FINISHED:
            assert time.monotonic() < deadline, f"{found}\n{self.logs()}"
            time.sleep(0.2)
        return found

    def logs(self) -> str:
        files = sorted((self.folder / "log").iterdir())
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + 60
        command = ["sinfo", "--noheader", "--Node", "--partition=normal", "--format=%T"]
        states: list[str] = []
        while states != ["idle"] * len(self.nodes):
            assert self.keeper.poll() is None, self.logs()
            assert time.monotonic() < deadline, f"{states}\n{self.logs()}"
            time.sleep(0.1)
            if (self.folder / "munge.socket").exists():
                done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30)
                states = done.stdout.split()
        # Accounts that NeMo-Run names must be known.
        self.run("sacctmgr", "--immediate", "add", "account", "research", "Cluster=throwaway")
        self.run("sacctmgr", "--immediate", "add", "user", getpass.getuser(), "Account=research")

    def _write(self) -> None:
        folder = self.folder
        folder.chmod(0o755)
        for name in ("state", "spool", "log", "run", "db"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        controller, database, accounting, *node_ports = free_ports(3 + len(self.nodes))
        values = {
            "folder": folder,
            "user": getpass.getuser(),
            "host": socket.gethostname().split(".")[0],
            "controller": controller,
            "database": database,
            "accounting": accounting,
            # Parallel clusters must not share job ids: ports are derived from them.
            "first_job": random.randrange(1000, 60_000_000),
        }
        (folder / "slurm.conf").write_text(SLURM_CONF.format(**values) + self._node_lines(values["host"], node_ports))
        (folder / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**values))
        (folder / "slurmdbd.conf").chmod(0o600)
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\nCgroupPlugin=cgroup/v1\n")
        (folder / "gres.conf").write_text(self._gpu_lines())
        subprocess.run(
            [
                program("mariadb-install-db"), "--no-defaults", f"--datadir={folder}/db", "--skip-test-db",
                "--auth-root-authentication-method=normal", f"--user={values['user']}",
            ],
            check=True, capture_output=True,
        )  # fmt: skip
        (folder / "daemons.json").write_text(json.dumps(self._daemons(values)))

    def _node_lines(self, host: object, ports: list[int]) -> str:
        return "".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=8000 "
            f"Gres=gpu:{GPUS_PER_NODE} State=UNKNOWN\n"
            for name, port in zip(self.nodes, ports, strict=True)
        )

    def _gpu_lines(self) -> str:
        """Character devices, so that Slurm sets CUDA_VISIBLE_DEVICES; plain files where there are none."""
        stem = "/dev/tty"
        if not all(Path(f"{stem}{number}").exists() for number in range(GPUS_PER_NODE)):
            stem = str(self.folder / "run" / "gpu")
            for number in range(GPUS_PER_NODE):
                Path(f"{stem}{number}").touch()
        devices = f"{stem}[0-{GPUS_PER_NODE - 1}]"
        return "".join(f"NodeName={name} Name=gpu File={devices} Flags=nvidia_gpu_env\n" for name in self.nodes)

    def _daemons(self, values: dict[str, object]) -> list[dict[str, object]]:
        folder = self.folder
        munge = [
            program("munged"), "--foreground", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/run/munge.pid", f"--log-file={folder}/log/munge.log",
            f"--seed-file={folder}/state/munge.seed", "--num-threads=2",
        ]  # fmt: skip
        mariadb = [
            program("mariadbd"), "--no-defaults", f"--datadir={folder}/db", f"--socket={folder}/db/socket",
            f"--port={values['database']}", "--bind-address=127.0.0.1", f"--pid-file={folder}/run/db.pid",
            f"--user={values['user']}", "--skip-grant-tables", "--skip-name-resolve", "--skip-log-bin",
            "--innodb-buffer-pool-size=16M",
        ]  # fmt: skip
        conf = str(folder / "slurm.conf")
        return [
            {"command": munge, "ready": str(folder / "munge.socket")},
            {"command": mariadb, "ready": values["database"]},
            {"command": [program("slurmdbd"), "-D"], "ready": values["accounting"]},
            # A slurmd that is up before its controller waits long before it asks again.
            {"command": [program("slurmctld"), "-D", "-f", conf], "ready": values["controller"]},
            *({"command": [program("slurmd"), "-D", "-N", n, "-f", conf], "ready": None} for n in self.nodes),
        ]


def program(name: str) -> str:
    found = shutil.which(name, path=SEARCH)
    assert found, name
    return found


# cred_expire: a requeued job starts only when its old credential has expired; 5 s is the least, by default it is 120 s.
# config_overrides: nodes may claim more CPUs than there are.
SLURM_CONF = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/controller.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting}
AccountingStoragePass={folder}/munge.socket
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=3600
FirstJobId={first_job}
MessageTimeout=30
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
EnforcePartLimits=ALL
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={accounting}
SlurmUser={user}
PidFile={folder}/run/accounting.pid
LogFile={folder}/log/slurmdbd.log
CommunicationParameters=NoInAddrAny
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=root
StorageLoc=accounting
"""
