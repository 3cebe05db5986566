"""When a batch script queues its job again, and when it does not, with a stand-in for the program."""

import shutil
import time

import pytest

from tests.system.slurm.cluster import REPOSITORY, Cluster

SCRIPT = REPOSITORY / "slurm" / "train.sbatch"
SMALL = ["--gpus-per-node=0", "--ntasks-per-node=1", "--nodes=1"]


class Jobs:
    """Submits `train.sbatch` with the stand-in, and reads what the attempts wrote."""

    def __init__(self, cluster: Cluster, folder) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "venv" / "bin").mkdir(parents=True)
        (folder / "venv" / "bin" / "python").symlink_to(REPOSITORY / "tests" / "system" / "slurm" / "stand_in.sh")
        self.ids: dict[str, str] = {}

    def submit(self, name: str, *options: str, **environment: str) -> None:
        environment = {"OFFGRPO_VENV": str(self.folder / "venv"), **environment}
        self.ids[name] = self.cluster.sbatch(*SMALL, *options, SCRIPT, name, cwd=self.folder, **environment)

    def log_folder(self, name: str):
        return self.folder / "logs" / f"offgrpo-train-{self.ids[name]}"

    def wait_for_line(self, name: str, line: str) -> None:
        deadline = time.monotonic() + 120
        log = self.log_folder(name) / "attempt-1.log"
        while not log.exists() or line not in log.read_text():
            assert time.monotonic() < deadline, self.output(name)
            time.sleep(0.1)

    def end(self, name: str) -> tuple[str, str, str]:
        """State, exit status and number of requeues."""
        found = self.cluster.wait(self.ids[name])
        return found["JobState"], found["ExitCode"], found["Restarts"]

    def output(self, name: str) -> str:
        path = self.folder / f"offgrpo-train-{self.ids[name]}.out"
        return path.read_text() if path.exists() else ""

    def attempts(self, name: str) -> list[str]:
        return [path.read_text() for path in sorted(self.log_folder(name).glob("attempt-*.log"))]


@pytest.fixture(scope="module")
def jobs(cluster, submitted, tmp_path_factory) -> Jobs:
    """All jobs at once, beside the chain of the other tests: a job that is queued again waits some seconds."""
    jobs = Jobs(cluster, tmp_path_factory.mktemp("rules"))
    third = cluster.nodes[2]
    elsewhere = f"--exclude={third}"
    jobs.submit("crash", elsewhere)
    jobs.submit("refused", elsewhere)
    jobs.submit("slices", elsewhere, OFFGRPO_ATTEMPTS="2")
    jobs.submit("bad_node", "--nodes=2")
    jobs.submit("wait", f"--nodelist={third}", "--cpus-per-task=7")
    jobs.submit("contained", elsewhere, **container(jobs.folder, cluster))
    return jobs


def container(folder, cluster: Cluster) -> dict[str, str]:
    """A job's environment with a container image; its python is the stand-in."""
    programs = folder / "programs"
    programs.mkdir()
    for name, stand_in in (("srun", "srun_with_pyxis.sh"), ("python", "stand_in.sh")):
        (programs / name).symlink_to(REPOSITORY / "tests" / "system" / "slurm" / stand_in)
    search = cluster.environment["PATH"]
    return {
        "PATH": f"{programs}:{search}",
        "REAL_SRUN": str(shutil.which("srun", path=search)),
        "CONTAINER_NOTES": str(folder / "container"),
        "OFFGRPO_CONTAINER_IMAGE": "registry/image:1",
        "OFFGRPO_CONTAINER_MOUNTS": "/data:/data",
        # In a container the environment of the checkout does not count.
        "OFFGRPO_VENV": "/none",
    }


def test_preemption_saves_and_goes_on(jobs, cluster):
    jobs.wait_for_line("wait", "from step 0")
    urgent = cluster.sbatch(
        "--partition=urgent", f"--nodelist={cluster.nodes[2]}", "--cpus-per-task=7", "--wrap=sleep 1", cwd=jobs.folder
    )
    assert jobs.end("wait") == ("COMPLETED", "0:0", "1"), jobs.output("wait")
    assert cluster.wait(urgent)["JobState"] == "COMPLETED"
    assert [("from step 0" in text, "from step 1" in text) for text in jobs.attempts("wait")] == [
        (True, False),
        (False, True),
    ]


def test_a_crash_is_tried_three_times(jobs):
    assert jobs.end("crash") == ("FAILED", "3:0", "2"), jobs.output("crash")
    assert len(jobs.attempts("crash")) == 3
    assert "given up: 3 attempts in a row without progress" in jobs.output("crash")


def test_the_container_gets_its_options(jobs):
    assert jobs.end("contained") == ("COMPLETED", "0:0", "0"), jobs.output("contained")
    here = jobs.folder
    assert (here / "container").read_text().splitlines() == [
        "--container-image=registry/image:1",
        f"--container-workdir={here}",
        f"--container-mounts={here}:{here},{jobs.log_folder('contained')}:{jobs.log_folder('contained')},/data:/data",
    ]


def test_a_refusal_is_not_tried_again(jobs):
    assert jobs.end("refused") == ("FAILED", "1:0", "0")
    assert "error: plan: no finished plan here" in jobs.output("refused")


def test_short_slices_make_progress(jobs):
    """Four slices of one step each, though two attempts without progress would end it."""
    assert jobs.end("slices") == ("COMPLETED", "0:0", "3"), jobs.output("slices")
    assert "given up" not in jobs.output("slices")


def test_the_failed_node_is_left_out(jobs, cluster):
    assert jobs.end("bad_node") == ("COMPLETED", "0:0", "1"), jobs.output("bad_node")
    bad = (jobs.log_folder("bad_node") / "bad").read_text().strip()
    assert cluster.job(jobs.ids["bad_node"])["ExcNodeList"] == bad
    last = jobs.attempts("bad_node")[-1]
    assert all((f"on {node} " in last) == (node != bad) for node in cluster.nodes), last


def test_a_cancelled_job_stays_cancelled(jobs, cluster):
    jobs.submit("wait", "--exclude=" + cluster.nodes[2])
    jobs.wait_for_line("wait", "from step 0")
    cluster.run("scancel", jobs.ids["wait"])
    assert jobs.end("wait")[0] == "CANCELLED", jobs.output("wait")
    time.sleep(1)
    assert cluster.job(jobs.ids["wait"])["JobState"] == "CANCELLED"
    assert jobs.end("wait")[2] == "0"
