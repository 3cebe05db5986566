"""What Megatron-Core does by itself; docs/decisions.md lists what this project does in its place.

Each test fails when Megatron has mended what it shows: then the patch of that line of the table can go.
"""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing import serialization
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer.moe.router import TopKRouter

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def stock() -> dict:
    """What a process without the patches has found."""
    command = [sys.executable, "-m", "tests.unit.parallel.stock_megatron"]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


def test_megatron_asks_for_a_gpu_by_name(stock):
    assert "NVIDIA" in stock["seed"] or "CUDA" in stock["seed"]


def test_it_loads_the_compiler_when_it_is_imported(stock):
    assert stock["compiler"] == ["torch._dynamo", "torch._inductor"]


def test_split_sizes_of_a_cpu_tensor_do_not_become_numpy(stock):
    assert stock["numpy_split_sizes"] == "Tensor"


def test_a_forgotten_layout_keeps_its_process_groups(stock):
    made, left = stock["groups_left"]
    assert left > 1, f"{made} groups were made"


def test_a_fresh_adamw_of_torch_has_no_state_dict(stock):
    assert stock["optimizer"] == "AdamW"
    assert stock["fresh_adamw"].startswith("AssertionError")


def test_a_sharded_checkpoint_is_copied_into_weights_that_ask_for_gradients(stock):
    assert "in-place operation" in stock["load"]


def test_megatron_writes_a_process_group_into_the_metadata_dict(stock):
    assert stock["metadata_dict"] == ["dp_cp_group"]


def test_a_student_outlives_its_last_reference(stock):
    assert stock["student_stays"] is True


def test_reading_a_checkpoint_runs_what_its_metadata_holds(stock):
    assert "ran" in stock["metadata"], stock["metadata_error"]


def test_the_queue_of_write_results_is_another_process(stock):
    assert stock["queue_processes"] >= 1


def test_rank_0_alone_writes_the_last_file_of_a_checkpoint():
    """An error there leaves the others waiting in the barrier: nothing tells them."""
    body = inspect.getsource(serialization.save)
    written = body[body.index("def metadata_finalize_fn") : body.index("def integrity_finalize_fn")]
    assert [line.strip() for line in written.splitlines()[1:3]] == [
        "if torch.distributed.get_rank() == 0:",
        "save_config(",
    ]
    assert "try" not in written


def test_the_load_balancing_loss_expects_a_division_by_the_tokens_of_the_step():
    body = inspect.getsource(TopKRouter.attach_and_log_load_balancing_loss)
    assert "total_global_tokens" in body
    assert "num_local_tokens * self.tp_cp_group.size()" in " ".join(body.split())


def test_the_model_class_of_megatron_is_deprecated():
    assert "GPTModel IS DEPRECATED" in inspect.getsource(gpt_model.GPTModel.__init__)
