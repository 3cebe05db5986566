"""One Slurm for the tests of this folder, and one chain that runs while the other tests wait."""

import os
from pathlib import Path

import pytest

from tests.system.slurm import toy_chain
from tests.system.slurm.cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster():
    missing = missing_programs()
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} missing; make install-slurm installs them (Debian, root)")
    with Cluster() as started:
        yield started


@pytest.fixture(scope="session")
def submitted(cluster: Cluster, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The folder and the job ids of a chain that has just been submitted."""
    folder = tmp_path_factory.mktemp("chain")
    return folder, toy_chain.submit(cluster, folder, eval_shards=int(os.environ.get("SLURM_TEST_EVAL_SHARDS", "1")))


@pytest.fixture(scope="session")
def chain(cluster: Cluster, submitted) -> tuple[Path, dict[str, str]]:
    """The same, ended."""
    cluster.wait(submitted[1]["report"], 570)
    return submitted
