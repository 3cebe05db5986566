"""An optimizer on the CPU's memory makes the same updates; tried where there is no GPU by calling the CPU one."""

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from megatron_offgrpo.artifacts import Manifest
from megatron_offgrpo.config import LayoutConfig, RunConfig, with_values
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.training import student as student_module
from megatron_offgrpo.training.checkpoint import CheckpointWriter, load_all
from megatron_offgrpo.training.student import Student, build_student
from tests.distributed.toy import architecture, toy_run

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a pretended GPU; tests/gpu has the real one")


@pytest.fixture(scope="module")
def place():
    yield runtime.start(LayoutConfig(), seed=0)
    runtime.stop()


class PretendGpu(TorchFunctionMode):
    """Tensors say that they are on a GPU, but for those that come from `Tensor.cpu()`."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func == torch.Tensor.is_cuda.__get__:
            return not hasattr(args[0], "on_host")
        if func is torch.Tensor.cpu:
            copy = args[0].clone()
            copy.on_host = True
            return copy
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and args and hasattr(args[0], "on_host"):
            result.on_host = True
        return result


def run_of(*, offload: bool) -> RunConfig:
    return with_values(
        toy_run(),
        model={"precision": "bf16"},
        optimizer={"cpu_offload": offload, "lr": 1e-2, "weight_decay": 0.1},
        checkpoint={"format": "reshardable"},
    )


def make(*, offload: bool) -> Student:
    torch.manual_seed(0)
    with PretendGpu():
        student = build_student(architecture("qwen2"), run_of(offload=offload))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in student.models[0].parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
        # As after loading weights.
        student.optimizer.reload_model_params()
    return student


def step(student: Student, number: int) -> float:
    student.zero_grad()
    generator = torch.Generator().manual_seed(number)
    for parameter in student.models[0].parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    return float(student.optimizer.step()[1])


def same(a: Student, b: Student) -> bool:
    pairs = zip(a.models[0].parameters(), b.models[0].parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@without_gpu
@pytest.mark.parametrize("form", ["reshardable", "sharded"])
def test_the_same_updates_and_an_exact_resume_but_from_a_sharded_checkpoint(form, place, tmp_path, monkeypatch):
    """Where the resume from a sharded one is exact too, `_check_offload` need not refuse it."""
    monkeypatch.setattr(student_module, "_check_offload", lambda run: None)
    plain, offloaded = make(offload=False), make(offload=True)
    (hybrid,) = [part.optimizer for part in offloaded.optimizer.chained_optimizers]
    assert hybrid.gpu_optimizer is None
    assert len(hybrid.cpu_optimizers) == len(list(offloaded.models[0].parameters()))
    start = [parameter.detach().clone() for parameter in plain.models[0].parameters()]
    for number in range(3):
        assert step(plain, number) == step(offloaded, number)
        assert same(plain, offloaded), number
    assert not any(torch.equal(a, b) for a, b in zip(start, plain.models[0].parameters(), strict=True))
    writer = CheckpointWriter(tmp_path, place, keep=0, asynchronous=False)
    writer.save(offloaded, 3, Manifest(kind="checkpoint", fingerprint="test"), form)
    step(plain, 3)
    resumed = make(offload=True)
    with PretendGpu():
        load_all(resumed, tmp_path / "iter_0000003")
    step(resumed, 3)
    assert same(plain, resumed) == (form == "reshardable")


@without_gpu
def test_without_a_gpu_there_is_nothing_to_offload(place):
    with pytest.raises(ConfigError, match=r"optimizer\.cpu_offload: there is no GPU whose memory this would save"):
        build_student(architecture("qwen2"), run_of(offload=True))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"model": {"precision": "fp32"}}, "needs weights in bf16; expected model.precision bf16; got fp32"),
        ({"checkpoint": {"format": "sharded"}}, "does not load .* from a sharded checkpoint.*--set checkpoint.format"),
    ],
)
def test_what_offloading_needs(section, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=message):
        build_student(architecture("qwen2"), with_values(run_of(offload=True), **section))
