"""What each rank does in the tests of Transformer Engine's layer: one step computed in two ways, and checkpoints."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_offgrpo.artifacts import Manifest, write_manifest
from megatron_offgrpo.config import LayoutConfig, RunConfig
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.model import gpt
from megatron_offgrpo.model.hf_config import Architecture
from megatron_offgrpo.objective.compose import results, to_metrics
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.training.checkpoint import load_all
from megatron_offgrpo.training.checkpoint_state import layout_of, saved_state
from megatron_offgrpo.training.checkpoint_write import begin_writing
from megatron_offgrpo.training.step import compute_gradients
from megatron_offgrpo.training.student import Student, build_student
from tests.distributed import toy
from tests.distributed.layout_worker import packs_of, run_of

ENGINE = {"layer": "transformer_engine"}
BF16 = {**ENGINE, "precision": "bf16"}
FP8 = {**ENGINE, "precision": "fp8"}
SMALL = {"groups_per_step": 2, "pack_multiple": 32}
"""Of the plan: few packs, with a multiple of 16 tokens on each of two ranks."""


def architecture(kind: str) -> Architecture:
    """The toy model with two layers, widened so that tp 2 leaves multiples of 16 for fp8."""
    found = toy.architecture(kind)
    experts = found.experts and replace(found.experts, ffn_hidden_size=32)
    return replace(found, num_layers=2, ffn_hidden_size=64, experts=experts)


def named(student: Student) -> dict[str, torch.nn.Parameter]:
    """Parameters of one chunk under the names of Transformer Engine's layer."""
    model = student.models[0]
    names = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"}
    if model.config.num_moe_experts is None:
        names["pre_mlp_layernorm.weight"] = "mlp.linear_fc1.layer_norm_weight"
    found = {}
    for name, parameter in model.named_parameters():
        for portable, fused in names.items():
            name = name.replace(portable, fused)
        found[name] = parameter
    return found


@torch.no_grad()
def fill(student: Student) -> None:
    """The same random weights in either layer: norms around 1, the rest around 0."""
    for number, (name, parameter) in enumerate(sorted(named(student).items())):
        generator = torch.Generator().manual_seed(number)
        values = 0.1 * torch.randn(parameter.shape, generator=generator) + float("norm" in name)
        parameter.copy_(values)
    student.optimizer.reload_model_params()


def make_student(run: RunConfig, kind: str, *, distributed_optimizer: bool = True) -> Student:
    student = build_student(architecture(kind), run, distributed_optimizer=distributed_optimizer)
    # The first stage of a dense pipeline has no norm that is not fused into a projection.
    norms = [m for name, m in student.models[0].named_modules() if name.endswith("layernorm") and list(m.parameters())]
    expected = "megatron_offgrpo" if run.model.layer == "portable" else "transformer_engine"
    assert {type(norm).__module__.partition(".")[0] for norm in norms} <= {expected}
    projections = {type(m).__name__ for name, m in student.models[0].named_modules() if name.endswith(".linear_qkv")}
    expected = "ColumnParallelLinear" if run.model.layer == "portable" else "TELayerNormColumnParallelLinear"
    assert projections == {expected}
    fill(student)
    return student


def gradients(student: Student, run: RunConfig, store: TrajectoryStore, place: runtime.Placement) -> tuple[float, dict]:
    """Loss of step 0, and this rank's gradients by name."""
    numbers, make_batch = packs_of(run, store, place)
    student.zero_grad()
    stacked, bad = compute_gradients(student, numbers, make_batch, run, place)
    assert bad is None
    found = {name: parameter.main_grad.clone() for name, parameter in named(student).items()}
    return results(to_metrics(stacked))["loss"], found


def compare(case: dict, store: TrajectoryStore, place: runtime.Placement) -> list[dict]:
    """Of each way of a case (kind, layout, plan, ways) and the one before it: both losses, the largest relative
    difference of a gradient with its name, the cosine of all gradients."""
    found = []
    for way in case["ways"]:
        run = run_of({**case, "model": way})
        found.append(gradients(make_student(run, case["kind"], distributed_optimizer=False), run, store, place))
    return [
        {"losses": [loss, other_loss], **_differences(expected, other)}
        for (loss, expected), (other_loss, other) in itertools.pairwise(found)
    ]


def _differences(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict:
    assert found.keys() == expected.keys()
    whole = _norm(expected.values())
    assert whole > 0
    relative = {
        name: float((found[name] - gradient).norm() / max(gradient.norm(), 1e-6 * whole))
        for name, gradient in expected.items()
    }
    worst = max(relative, key=relative.__getitem__)
    product = sum((found[name] * gradient).sum() for name, gradient in expected.items())
    return {"worst": [worst, relative[worst]], "cosine": float(product / whole / _norm(found.values()))}


def _norm(tensors) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


def step(student: Student, run: RunConfig, store: TrajectoryStore, place: runtime.Placement) -> None:
    """One update on step 0, large enough to be seen in bf16, and smooth in the gradient."""
    gradients(student, run, store, place)
    for group in student.optimizer.param_groups:
        group["lr"], group["eps"] = 1e-2, 1e-5
    student.optimizer.step()


def save(student: Student, folder: Path, place: runtime.Placement, form: str = "reshardable") -> None:
    """Writes what a run writes, without its writer process."""
    folder.mkdir(parents=True)
    begin_writing(saved_state(student, 1, form), folder, place).execute_sync()
    counts = {"format": form, "layout": layout_of(student)}
    write_manifest(folder, Manifest(kind="checkpoint", fingerprint="test", counts=counts))


def same(a: Student, b: Student) -> bool:
    """Weights, master weights and moments, to the bit."""
    return all(torch.equal(x, y) for x, y in zip(_held(a), _held(b), strict=True))


def _held(student: Student) -> list[Tensor]:
    (part,) = student.optimizer.chained_optimizers
    masters = [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
    moments = [part.optimizer.state[master][name] for master in masters for name in ("exp_avg", "exp_avg_sq")]
    return [*named(student).values(), *masters, *moments]


def check_checkpoints(folder: Path, store: TrajectoryStore, place: runtime.Placement) -> None:
    """A run in fp8 resumes to the bit, in both formats; its checkpoint and weights are left in FOLDER/engine."""
    run = run_of({"plan": SMALL, "model": FP8})
    student = make_student(run, "qwen3")
    step(student, run, store, place)
    for form in ("reshardable", "sharded"):
        save(student, folder / "engine" / form, place, form)
    weights = {name: parameter.detach().cpu().clone() for name, parameter in named(student).items()}
    torch.save(weights, folder / "engine" / "weights.pt")
    step(student, run, store, place)
    for form in ("reshardable", "sharded"):
        resumed = build_student(architecture("qwen3"), run)
        load_all(resumed, folder / "engine" / form)
        step(resumed, run, store, place)
        assert same(student, resumed), form


def check_portable_checkpoint(folder: Path, store: TrajectoryStore, place: runtime.Placement) -> None:
    """From FOLDER/portable both layers go on alike."""
    after = []
    for layer in ("portable", "transformer_engine"):
        run = run_of({"plan": SMALL, "model": {"layer": layer}})
        student = build_student(architecture("qwen3"), run)
        load_all(student, folder / "portable")
        before = {name: parameter.detach().clone() for name, parameter in named(student).items()}
        step(student, run, store, place)
        after.append(named(student))
    for name, weight in after[0].items():
        moved = (weight.detach() - before[name]).norm()
        assert moved > 0
        assert (weight - after[1][name]).norm() <= 1e-3 * moved, name


def run_cases(folder: str, cases: list[dict]) -> None:
    """Writes what `compare` finds of each case as FOLDER/name-rank.json; one process alone looks at checkpoints too."""
    # The stand-in does without a GPU.
    gpt.require_layer = lambda model: None
    store = TrajectoryStore.open(Path(folder) / "store")
    for case in cases:
        place = runtime.start(LayoutConfig(**case["layout"]), seed=0)
        found = compare(case, store, place)
        (Path(folder) / f"{case['name']}-{place.rank}.json").write_text(json.dumps(found))
    if place.world_size == 1:
        check_checkpoints(Path(folder), store, place)
        check_portable_checkpoint(Path(folder), store, place)
    runtime.stop()
