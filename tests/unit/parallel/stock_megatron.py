"""Run as a script: what Megatron-Core does where nothing of this project is in its place, as one JSON object."""

import contextlib
import gc
import json
import os
import pickle
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

found: dict[str, Any] = {}
LAYOUT_METADATA = {"distrib_optim_sharding_type": "dp_reshardable"}


def error_of(action: Callable[[], object]) -> str:
    """The first line of what it raises, empty where it goes well."""
    try:
        action()
    except BaseException as cause:  # torch's CheckpointException is none of Exception's
        return f"{type(cause).__name__}: {cause}".splitlines()[0]
    return ""


def before_any_patch() -> None:
    import megatron.core.models.gpt  # noqa: F401
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe import moe_utils

    found["compiler"] = [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
    found["numpy_split_sizes"] = type(moe_utils.maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True)).__name__
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    found["seed"] = error_of(lambda: model_parallel_cuda_manual_seed(1))
    groups = len(dist.distributed_c10d._world.pg_map)
    parallel_state.destroy_model_parallel()
    found["groups_left"] = [groups, len(dist.distributed_c10d._world.pg_map)]
    found["metadata"] = ran_by_reading_metadata()


def ran_by_reading_metadata() -> list[str]:
    """What lies in a folder after Megatron has read a checkpoint whose metadata is a program."""
    from megatron.core import dist_checkpointing

    from tests.evil import Evil

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint"
        folder.mkdir()
        (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
        (folder / ".metadata").write_bytes(pickle.dumps(Evil(Path(name) / "ran")))
        found["metadata_error"] = error_of(lambda: dist_checkpointing.load({}, str(folder)))
        return sorted(path.name for path in Path(name).iterdir())


def on_the_cpu() -> None:
    """With a student, so in the CPU mode, but with torch's own AdamW."""
    from megatron_offgrpo.config import LayoutConfig
    from megatron_offgrpo.parallel import adamw, runtime
    from megatron_offgrpo.training.checkpoint_state import model_state
    from megatron_offgrpo.training.student import build_student
    from tests.distributed.toy import architecture, toy_run

    with mock.patch.object(adamw, "install"):
        runtime.start(LayoutConfig(), seed=0)
    student = build_student(architecture("qwen2"), toy_run())
    found["optimizer"] = type(student.optimizer.chained_optimizers[0].optimizer).__name__
    found["fresh_adamw"] = error_of(student.optimizer.state_dict)
    metadata = dict(LAYOUT_METADATA)
    student.models[0].sharded_state_dict(metadata=metadata)
    found["metadata_dict"] = sorted(metadata.keys() - LAYOUT_METADATA.keys())
    assert model_state(student)
    model = weakref.ref(student.models[0])
    del student
    gc.collect()
    found["student_stays"] = model() is not None


def load_with_gradients() -> None:
    """A sharded checkpoint, loaded by a student of this project where its fp32 weights ask for gradients."""
    from megatron_offgrpo.artifacts import Manifest
    from megatron_offgrpo.config import LayoutConfig
    from megatron_offgrpo.parallel import runtime
    from megatron_offgrpo.training import checkpoint, checkpoint_state
    from megatron_offgrpo.training.student import build_student
    from tests.distributed.toy import architecture, toy_run

    place = runtime.start(LayoutConfig(), seed=0)
    student = build_student(architecture("qwen2"), toy_run())
    student.zero_grad()
    student.optimizer.step()
    with tempfile.TemporaryDirectory() as name:
        writer = checkpoint.CheckpointWriter(Path(name), place, keep=0, asynchronous=False)
        writer.save(student, 1, Manifest(kind="checkpoint", fingerprint="test"), "sharded")
        with mock.patch.object(checkpoint_state, "torch", SimpleNamespace(no_grad=contextlib.nullcontext)):
            found["load"] = error_of(lambda: checkpoint.load_all(student, Path(name) / "iter_0000001"))


def queue_of_results() -> None:
    import psutil
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    before = len(psutil.Process().children())
    filesystem_async.get_write_results_queue()
    found["queue_processes"] = len(psutil.Process().children()) - before
    for child in psutil.Process().children():
        child.kill()  # they would outlive this process and hold its output open
    filesystem_async._results_queue = None


if __name__ == "__main__":
    before_any_patch()
    on_the_cpu()
    queue_of_results()
    load_with_gradients()
    sys.stdout.write("\n" + json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)
