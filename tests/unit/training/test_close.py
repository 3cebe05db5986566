"""What a run leaves in a process that goes on: a rollback, the study."""

import gc
import os
import weakref

from megatron_offgrpo.config import LayoutConfig
from megatron_offgrpo.model.hf_config import read_architecture
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.training.student import build_student
from tests.distributed.toy import toy_run, write_hf_model


def run_once(folder) -> weakref.ref:
    runtime.start(LayoutConfig(), seed=0)
    student = build_student(read_architecture(folder), toy_run())
    model = weakref.ref(student.models[0])
    student.close()
    runtime.stop()
    return model


def test_a_closed_student_is_freed_with_its_process_groups(tmp_path):
    write_hf_model(tmp_path)
    threads = []
    for _ in range(2):
        model = run_once(tmp_path)
        gc.collect()
        assert model() is None
        threads.append(len(os.listdir("/proc/self/task")))
    # Each of gloo's groups has threads of its own that wake up a hundred times a second.
    assert threads[0] == threads[1]
