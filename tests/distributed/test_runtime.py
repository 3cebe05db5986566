"""Process groups: a process that takes one layout after another keeps nothing of the earlier ones."""

import json
import os
from pathlib import Path

from megatron_offgrpo.config import LayoutConfig
from megatron_offgrpo.parallel import runtime
from tests.distributed.harness import run_ranks


def write_thread_counts(output: str) -> None:
    """Threads of this process after each of several rounds through three layouts."""
    counts = []
    for _ in range(3):
        for layout in (LayoutConfig(tp=2), LayoutConfig(pp=2), LayoutConfig()):
            place = runtime.start(layout, seed=0)
        counts.append(len(os.listdir("/proc/self/task")))
    if place.is_writer:
        Path(output).write_text(json.dumps(counts))
    runtime.stop()


def test_the_groups_of_earlier_layouts_are_left(tmp_path):
    run_ranks("tests.distributed.test_runtime:write_thread_counts", 2, output=str(tmp_path / "counts"))
    first, *later = json.loads((tmp_path / "counts").read_text())
    assert first > 1
    assert later == [first, first]
