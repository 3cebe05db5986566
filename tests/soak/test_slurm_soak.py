"""The chain on Slurm five times in a row, each on a new cluster; what `make test` leaves out; a time limit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.slurm.cluster import REPOSITORY, Cluster, missing_programs
from tests.system.slurm.test_batch_rules import Jobs

pytestmark = pytest.mark.skipif(bool(missing_programs()), reason=f"no Slurm here: {missing_programs()}")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", range(5))
def test_the_chain_in_a_row(number, tmp_path):
    """With the signal in mid-run and the shards; the first time all tests on Slurm, those of the soak included."""
    tests = "tests/system/slurm" + ("" if number == 0 else "/test_pipeline.py")
    options = ["-m", "soak or not soak", "-q", "-x", f"--basetemp={tmp_path / 'suite'}"]
    command = [sys.executable, "-m", "pytest", tests, *options]
    # Evaluations in arrays, too.
    environment = {**os.environ, "SLURM_TEST_EVAL_SHARDS": "2"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
    assert not list(Path(tmp_path.parent).glob("slurm-*"))


def test_the_time_limit_saves_and_goes_on(tmp_path):
    """Slurm looks at limits every half minute, and ends a job up to a minute after its own."""
    with Cluster(nodes=1) as cluster:
        jobs = Jobs(cluster, tmp_path)
        jobs.submit("wait", "--time=2", "--signal=B:USR1@60")
        found = cluster.wait(jobs.ids["wait"], 300)
        assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), jobs.output("wait")
        assert "SIGUSR1: the tasks save and stop" in jobs.output("wait")
