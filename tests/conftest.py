"""Which tests stay together when several processes share them out (`make test`)."""

import pytest


# Before pytest-xdist's own, which reads the marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those of a file, for the sake of its fixtures; those on Slurm, which share one cluster and one chain."""
    for item in items:
        folder = item.path.parent
        item.add_marker(pytest.mark.xdist_group("slurm" if folder.name == "slurm" else str(item.path)))
