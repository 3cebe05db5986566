"""One Slurm for the tests of this folder."""

import pytest

from tests.system.slurm.cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster():
    missing = missing_programs()
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} missing; make install-slurm installs them (Debian, root)")
    with Cluster() as started:
        yield started
