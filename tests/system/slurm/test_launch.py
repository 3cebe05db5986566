"""`offgrpo launch`: NeMo-Run on the real Slurm with accounting, on this machine, and what a dry run prints."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.slurm.cluster import REPOSITORY
from tests.system.slurm.toy_chain import RECIPE, settings

LAUNCHER = REPOSITORY / ".venv-launch" / "bin" / "offgrpo"
GOLDEN = Path(__file__).parent / "golden" / "slurm.txt"
pytestmark = pytest.mark.skipif(not LAUNCHER.exists(), reason="no .venv-launch: make install-launch")


class Launcher:
    """Runs `offgrpo launch` and `offgrpo jobs` with the experiments of a test."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        own = {"NEMORUN_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        self.environment = {**environment, **own}

    def __call__(self, *arguments: object, expect: int = 0) -> str:
        done = subprocess.run(
            [LAUNCHER, *map(str, arguments)],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert done.returncode == expect, f"{done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-4000:]}"
        assert "Traceback" not in done.stderr
        self.errors = done.stderr
        return done.stdout

    def launch(self, executor: str, *arguments: object, expect: int = 0) -> str:
        return self("launch", RECIPE, "--executor", executor, "--python", sys.executable, *arguments, expect=expect)

    def replace_program(self, name: str, script: str) -> None:
        program = self.folder / "bin" / name
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        self.environment["PATH"] = f"{program.parent}:{self.environment['PATH']}"

    def experiment(self) -> str:
        return re.search(r"launch: experiment (\S+)", self.errors).group(1)


def states(output: str) -> dict[str, str]:
    """Task -> state, from the table."""
    ended = ("succeeded", "failed", "cancelled", "waiting", "running")
    rows = [line.split() for line in output.splitlines() if not line.startswith(" ")]
    return {row[0]: row[-1] for row in rows if len(row) in (2, 3) and row[-1] in ended}


@pytest.fixture
def local(tmp_path) -> Launcher:
    return Launcher(tmp_path, dict(os.environ))


@pytest.fixture
def on_slurm(tmp_path, cluster) -> Launcher:
    return Launcher(tmp_path, cluster.environment)


def test_slurm_says_which_step_failed_and_why(on_slurm, chain, cluster):
    """The plan is made again; training finds no reference; nothing comes after."""
    sets = settings(chain[0], f"paths.reference={on_slurm.folder / 'none'}", f"paths.output={on_slurm.folder / 'out'}")
    options = ["--nodes", 2, "--gpus-per-node", 2, "--account", "research", "--partition", "normal", "--time", "10"]
    chosen = ["--steps", "plan,train,export", "--poll-seconds", "1", "--env", "NOTE=two words"]
    output = on_slurm.launch("slurm", *sets, *options, *chosen, expect=1)
    assert states(output) == {"plan": "succeeded", "train": "failed", "export": "cancelled"}, output
    assert "train failed; the last lines of its log:" in output
    assert "no finished reference here" in output
    experiment = on_slurm.experiment()
    assert states(on_slurm("jobs", "status", experiment, expect=1)) == states(output)
    assert "steps" in on_slurm("jobs", "logs", experiment, "plan")
    jobs = re.findall(r"^train +(\d+)", output, re.MULTILINE)
    accounted = cluster.run("sacct", "-X", "-n", "-P", "-j", jobs[0], "-o", "Account,NNodes,State")
    assert accounted.split() == ["research|2|FAILED"]


@pytest.mark.soak
def test_slurm_success_detached_and_cancelled(on_slurm, chain, cluster):
    sets = settings(chain[0])
    output = on_slurm.launch("slurm", *sets, "--steps", "report", "--poll-seconds", "1")
    assert states(output) == {"report": "succeeded"}, output
    output = on_slurm.launch("slurm", *sets, "--steps", "plan,report", "--detach", "--sbatch", "begin=now+1hour")
    assert states(output) == {"plan": "waiting", "report": "waiting"}
    assert on_slurm("jobs", "cancel", on_slurm.experiment()).startswith("cancelled: plan, report")
    jobs = re.findall(r"^(?:plan|report) +(\d+)", output, re.MULTILINE)
    assert [cluster.job(job)["JobState"] for job in jobs] == ["CANCELLED", "CANCELLED"]


def test_jobs_of_which_the_accounting_has_not_heard_are_cancelled(on_slurm, cluster):
    output = on_slurm.launch("slurm", "--steps", "plan,train", "--detach", "--sbatch", "begin=now+1hour")
    jobs = re.findall(r"^(?:plan|train) +(\d+)", output, re.MULTILINE)
    assert len(jobs) == 2
    on_slurm.replace_program("sacct", "exit 0")
    assert on_slurm("jobs", "cancel", on_slurm.experiment()).startswith("cancelled: plan, train")
    assert [cluster.job(job)["JobState"] for job in jobs] == ["CANCELLED", "CANCELLED"]


def test_where_a_job_is_refused_those_before_it_are_cancelled(on_slurm, cluster):
    ids, sbatch = on_slurm.folder / "ids", shutil.which("sbatch")
    refuse = 'echo "sbatch: error: no second job" >&2; exit 1'
    on_slurm.replace_program("sbatch", f'if test -e {ids}; then {refuse}; fi\n{sbatch} "$@" | tee {ids}')
    on_slurm.launch("slurm", "--steps", "plan,train", "--sbatch", "begin=now+1hour", expect=1)
    assert "what was submitted has been cancelled" in on_slurm.errors
    assert "no second job" in on_slurm.errors
    assert cluster.job(ids.read_text().strip())["JobState"] == "CANCELLED"


def test_what_slurm_refuses_is_one_line(on_slurm):
    """No chain is needed: the first job is refused."""
    on_slurm.launch("slurm", "--steps", "plan,train", "--partition", "none", expect=1)
    assert "a command of Slurm failed" in on_slurm.errors
    assert "invalid partition" in on_slurm.errors


def test_local_executor(local, chain):
    output = local.launch("local", *settings(chain[0]), "--steps", "report")
    assert states(output) == {"report": "succeeded"}, output
    assert "report.html" in local("jobs", "logs", local.experiment(), "report")


@pytest.mark.soak
def test_torchrun_stops_after_a_failure(local, chain):
    """NeMo-Run's local executor alone would go on with the export."""
    sets = settings(chain[0], f"paths.reference={local.folder / 'none'}", f"paths.output={local.folder / 'out'}")
    chosen = ["--steps", "plan,train,export", "--gpus-per-node", 2]
    output = local.launch("torchrun", *sets, *chosen, expect=1)
    assert states(output) == {"plan": "succeeded", "train": "failed", "export": "cancelled"}, output
    assert "no finished reference here" in output
    log = next((local.folder / "logs").glob("*/train.log")).read_text()
    # Two ranks, started by torchrun.
    assert "rank 1: error" in log or "torch.distributed.elastic" in log


def test_a_wrong_recipe_is_one_line(local):
    local("launch", "quikstart", "--executor", "local", "--python", sys.executable, expect=1)
    assert "unknown recipe" in local.errors


def test_dry_run_prints_the_scripts(local):
    """The whole 7B chain; `UPDATE_GOLDEN=1 pytest ...` writes the file anew."""
    arguments = ["--gpus-per-node", 8, "--input", "groups.parquet", "--prepare-shards", 2, "--benchmark", "math500"]
    arguments += ["--nodes", 4, "--account", "research", "--partition", "gpu", "--container-image", "registry/image:1"]
    arguments += ["--mounts", "/data:/data", "--env", "NCCL_DEBUG=WARN", "--time", "12:00:00", "--sbatch", "qos=high"]
    output = local("launch", "openthinker3_7b", "--executor", "slurm", *arguments, "--dryrun")
    for found, name in ((r"openthinker3_7b_\d{10,}", "EXPERIMENT"), (str(local.folder), "WORKDIR")):
        output = re.sub(found, name, output)
    output = output.replace(str(REPOSITORY), "HOME")
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(output)
    assert output == GOLDEN.read_text()
    assert not list((local.folder / "home" / "experiments").glob("*/*"))
