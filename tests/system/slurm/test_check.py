"""`check.sbatch` finds the bad node of two; the batch files themselves are clean."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.system.slurm.cluster import REPOSITORY

FILES = sorted([*(REPOSITORY / "slurm").glob("*.s*"), *(REPOSITORY / "tests/system/slurm").glob("*.sh")])


def test_a_bad_node_is_named(cluster, tmp_path):
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    stand_in = REPOSITORY / "tests" / "system" / "slurm" / "python_with_bad_storage.sh"
    (tmp_path / "venv" / "bin" / "python").symlink_to(stand_in)
    good, bad, _ = cluster.nodes
    job = cluster.sbatch(
        "--nodes=2", "--gpus-per-node=2", f"--nodelist={good},{bad}", REPOSITORY / "slurm" / "check.sbatch",
        cwd=tmp_path, OFFGRPO_VENV=str(tmp_path / "venv"), BAD_NODE=bad, REAL_PYTHON=sys.executable,
    )  # fmt: skip
    ended = cluster.wait(job, 480)
    output = (tmp_path / f"offgrpo-check-{job}.out").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0"), output
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.startswith("127.")}
    assert rows[good][0] == "ok", output
    assert "-" not in rows[good][1:4], output
    assert all(float(number) > 0 for number in rows[good][1:4])
    assert rows[bad][0] == "bad"
    assert "storage: [Errno 5] Input/output error" in output
    assert f"sbatch --exclude={bad} ..." in output
    # The network between them was still measured.
    assert float(rows[bad][2]) > 0


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck: make install-slurm")
def test_shellcheck_is_silent():
    done = subprocess.run(["shellcheck", "-x", *map(str, FILES)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".sbatch"], ids=lambda path: path.name)
def test_no_name_of_a_site_stands_in_a_batch_file(path):
    """Account, partition, reservation, nodes, mail and absolute paths come from the command line."""
    options = re.findall(r"^#SBATCH --([a-z-]+)", path.read_text(), re.MULTILINE)
    assert set(options) <= {
        "job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal",
        "requeue", "open-mode", "output",
    }  # fmt: skip
    assert not re.search(r"(?<![\w$}.])/(home|scratch|lustre|fsx|data|opt|mnt)/", path.read_text())
