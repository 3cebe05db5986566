"""What a GPU must give: the CPU's loss and gradients, attention kernels and layers that agree, a lean head.

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
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpoints_conversion.safe_metadata import read_metadata
from megatron_offgrpo.config import LayoutConfig, ModelConfig
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.model.gpt import transformer_config
from megatron_offgrpo.model.layers import FP8_CAPABILITY, HAVE_TE, SegmentAttention
from megatron_offgrpo.model.packing import PackedSegments
from megatron_offgrpo.objective.compose import results, to_metrics
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.training.batch import Batch, build_batch, members_of
from megatron_offgrpo.training.checkpoint import load_all
from megatron_offgrpo.training.step import compute_gradients
from megatron_offgrpo.training.student import Student, build_student
from tests.distributed.layer_worker import BF16, ENGINE, FP8, SMALL, compare, make_student, named, save, step
from tests.distributed.layer_worker import architecture as wide_architecture
from tests.distributed.layout_worker import fake_reference, run_of
from tests.distributed.toy import architecture, toy_run, write_toy_store
from tools.bench_logprob import MAX_MEMORY_SHARE, measure

EXPECTED = Path(__file__).with_name("expected_gradients.json")
KINDS = ("qwen2", "qwen2_tied", "qwen3", "qwen3_moe")
TOLERANCE = 1e-5
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch finds none")
with_engine = pytest.mark.skipif(not HAVE_TE, reason="needs Transformer Engine, which cannot be imported")
with_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < FP8_CAPABILITY,
    reason="needs a GPU that computes in fp8",
)
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


@pytest.mark.gpu
@on_gpu
@with_engine
@pytest.mark.parametrize("kind", KINDS)
def test_transformer_engines_layer_agrees_with_the_portable_one(kind, store, place):
    (found,) = compare({"kind": kind, "plan": SMALL, "ways": [{}, ENGINE]}, store, place)
    # It multiplies fp32 as TF32, whose values have 11 bits, and near a tie that may send a token to another expert.
    assert found["losses"][1] == pytest.approx(found["losses"][0], rel=1e-3)
    assert found["cosine"] > 0.999
    assert kind == "qwen3_moe" or found["worst"][1] <= 2e-2, found["worst"]


@pytest.mark.gpu
@on_gpu
@with_engine
@with_fp8
@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe"])
def test_fp8_is_near_bf16_and_recomputed_the_same(kind, store, place):
    ways = [BF16, FP8, {**FP8, "recompute": "full"}]
    near, same = compare({"kind": kind, "plan": SMALL, "ways": ways}, store, place)
    # tests/distributed/test_transformer_engine.py says where the bounds come from.
    assert 0 < abs(near["losses"][1] - near["losses"][0]) <= 0.05 * abs(near["losses"][0])
    assert (0.93 if kind == "qwen3_moe" else 0.97) < near["cosine"] < 0.9999
    assert same["losses"][1] == pytest.approx(same["losses"][0], rel=1e-6)
    # The attention kernel adds up gradients in any order.
    assert same["cosine"] > 0.9999


@pytest.mark.gpu
@on_gpu
@with_engine
@with_fp8
def test_a_checkpoint_in_fp8_holds_tensors_alone_and_loads_into_both_layers(store, place, tmp_path):
    run = run_of({"plan": SMALL, "model": FP8})
    student = make_student(run, "qwen3")
    step(student, run, store, place)
    save(student, tmp_path / "saved")
    entries = read_metadata(tmp_path / "saved").state_dict_metadata.values()
    assert {type(entry) for entry in entries} == {TensorStorageMetadata}
    for model in (FP8, {"precision": "bf16"}):
        loaded = build_student(wide_architecture("qwen3"), run_of({"model": model}))
        load_all(loaded, tmp_path / "saved")
        theirs = named(loaded)
        assert all(torch.equal(weight, theirs[name]) for name, weight in named(student).items())


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
