"""What a GPU must give: the CPU's loss and gradients, attention kernels that agree, a lean head.

These tests have been written on a machine without a GPU and have not run on one yet. Without CUDA they skip; only the
check that the committed figures are those of this code runs everywhere. After a wanted change of the figures:

    OMP_NUM_THREADS=1 python -m tests.gpu.test_gpu
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

from megatron_offgrpo.config import LayoutConfig, ModelConfig
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.model.gpt import transformer_config
from megatron_offgrpo.model.layers import SegmentAttention
from megatron_offgrpo.model.packing import PackedSegments
from megatron_offgrpo.objective.compose import results, to_metrics
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.training.batch import Batch, build_batch, members_of
from megatron_offgrpo.training.step import compute_gradients
from megatron_offgrpo.training.student import Student, build_student
from tests.distributed.layout_worker import fake_reference
from tests.distributed.toy import architecture, toy_run, write_toy_store
from tools.bench_logprob import MAX_MEMORY_SHARE, measure

EXPECTED = Path(__file__).with_name("expected_gradients.json")
KINDS = ("qwen2", "qwen2_tied", "qwen3", "qwen3_moe")
TOLERANCE = 1e-5
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch finds none")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the figures are made on a machine without CUDA")


@pytest.fixture(scope="module")
def place():
    yield runtime.start(LayoutConfig(), seed=0)
    runtime.stop()


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TrajectoryStore:
    return write_toy_store(tmp_path_factory.mktemp("gpu") / "store")


def figures(kind: str, store: TrajectoryStore, place: runtime.Placement) -> dict:
    """Loss of step 0, and of each gradient its norm and its part along a fixed direction of length 1."""
    run = toy_run()
    student = build_student(architecture(kind), run, distributed_optimizer=False)
    fill(student)
    plan = build_plan(store, run.plan, run.objective)

    def make_batch(pack: int | None) -> Batch:
        return build_batch(
            store,
            members_of(plan, pack),
            pack=pack,
            pack_multiple=run.plan.pack_multiple,
            reference=lambda t: fake_reference(t, int(store.response_lengths[t])),
            device=place.device,
        )

    stacked, bad = compute_gradients(student, list(plan.packs_of_step(0)), make_batch, run, place)
    assert bad is None
    found = {"loss": results(to_metrics(stacked))["loss"]}
    for number, (name, parameter) in enumerate(student.models[0].named_parameters()):
        gradient = parameter.main_grad.double().cpu().numpy()
        direction = np.random.default_rng(number).standard_normal(gradient.shape)
        found[name] = [np.linalg.norm(gradient), (gradient * direction).sum() / np.linalg.norm(direction)]
    return found


@torch.no_grad()
def fill(student: Student) -> None:
    """The same random weights on every device; norms around 1, the rest around 0."""
    for number, (name, parameter) in enumerate(student.models[0].named_parameters()):
        values = np.random.default_rng([1, number]).normal(float("norm" in name), 0.1, tuple(parameter.shape))
        parameter.copy_(torch.from_numpy(values))


def check(kind: str, found: dict) -> None:
    expected = json.loads(EXPECTED.read_text())[kind]
    assert found.keys() == expected.keys()
    assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=TOLERANCE)
    whole = sum(norm**2 for norm, _ in expected.values()) ** 0.5
    assert whole > 0
    for name, (norm, along) in expected.items():
        # Neither figure can differ by more than the length of the difference of the two gradients.
        limit = TOLERANCE * max(norm, 1e-6 * whole)
        assert abs(found[name][0] - norm) <= limit, name
        assert abs(found[name][1] - along) <= limit, name


@on_cpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_committed_figures_are_those_of_this_code(kind, store, place):
    check(kind, figures(kind, store, place))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_in_fp32_equal_the_cpus(kind, store, place):
    assert place.device.type == "cuda"
    check(kind, figures(kind, store, place))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("prompts", [{}, {2: (1, 101), 3: (0, 1)}], ids=["separate", "shared"])
def test_variable_length_attention_in_bf16_equals_attention_by_segment(kv_heads, prompts, place):
    attention = SegmentAttention(transformer_config(architecture("qwen2"), LayoutConfig(), ModelConfig()), 0.125)
    segments = PackedSegments.of((0, 1, 130, 137, 512), place.device, prompts=prompts)
    generator = torch.Generator("cuda").manual_seed(0)
    heads = (4, kv_heads, kv_heads)
    inputs = [torch.randn(512, 1, n, 64, generator=generator, device="cuda").bfloat16().requires_grad_() for n in heads]
    found = []
    # fp32 takes torch's attention segment by segment; the gradients come back in bf16 either way.
    for dtype in (torch.bfloat16, torch.float32):
        out = attention(*(x.to(dtype) for x in inputs), None, segments)
        found.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    for a, b in zip(*found, strict=True):
        # Probabilities, result and the gradient that comes back are rounded to bf16: 2^-9 each time.
        assert (a.float() - b.float()).norm() <= 2e-2 * b.float().norm()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_head_takes_an_eighth_of_the_naive_memory(dtype):
    lean, naive = (measure(variant, "8192x32000", dtype, 64).extra_bytes for variant in ("head", "naive"))
    assert 0 < lean <= MAX_MEMORY_SHARE * naive


def write_expected() -> None:
    """Writes the figures of this machine, which must have no GPU."""
    assert not torch.cuda.is_available()
    place = runtime.start(LayoutConfig(), seed=0)
    with TemporaryDirectory() as folder:
        store = write_toy_store(Path(folder) / "store")
        found = {kind: figures(kind, store, place) for kind in KINDS}
    runtime.stop()
    lines = {kind: [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in values.items()] for kind, values in found.items()}
    text = ",\n".join(f' "{kind}": {{\n' + ",\n".join(part) + "\n }" for kind, part in lines.items())
    EXPECTED.write_text("{\n" + text + "\n}\n")


if __name__ == "__main__":
    write_expected()
