"""Every layout gives the loss and the gradients of one process, on the same packs and on other packs.

What is expected is computed with every trajectory a sequence of its own; the toy groups' prompts are a good part of
their tokens, so the cases share them wherever the plan does not forbid it.
"""

import json
from pathlib import Path

import pytest
import torch

from megatron_offgrpo.config import LayoutConfig
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.training.student import build_student
from tests.distributed.harness import run_ranks
from tests.distributed.layout_worker import NAMING, gradient, run_of, updated
from tests.distributed.shards import gradient_shards, overlap, parameter_shards, read_whole, write_shards
from tests.distributed.toy import architecture, toy_run, write_toy_store

TOLERANCE = 1e-5
KINDS = ("qwen2", "qwen2_tied", "qwen3", "qwen3_moe")
_TP2 = {"tp": 2}
_SP2 = {"tp": 2, "sequence_parallel": True}
_PP2 = {"pp": 2}
_CP2 = {"cp": 2}
_DP2: dict = {}
_SEPARATE = {"share_prompts": "never"}
TWO_PROCESSES = (
    [("qwen2", name, layout, {}) for name, layout in (("tp2", _TP2), ("sp2", _SP2), ("pp2", _PP2), ("dp2", _DP2))]
    + [("qwen2_tied", "sp2", _SP2, {}), ("qwen2_tied", "pp2", _PP2, {}), ("qwen3", "sp2", _SP2, {})]
    + [("qwen3_moe", "ep2", {"ep": 2}, {}), ("qwen3_moe", "pp2", _PP2, {})]
    + [("qwen2", "pp2_small_packs", _PP2, {"max_pack_tokens": 48}), ("qwen2", "vpp2", {"pp": 2, "vpp": 2}, {})]
    + [("qwen2", "cp2", {"cp": 2}, {}), ("qwen3_moe", "cp2", {"cp": 2}, {})]
    + [
        ("qwen3_moe", name, layout, {})
        for name, layout in (("sp2", _SP2), ("dp2", _DP2), ("vpp2", {"pp": 2, "vpp": 2}))
    ]
    + [("qwen3_moe", "sp2_ep2", {**_SP2, "ep": 2}, {})]
    + [
        ("qwen2", f"{name}_separate", layout, _SEPARATE)
        for name, layout in (("sp2", _SP2), ("pp2", _PP2), ("cp2", _CP2))
    ]
)
FOUR_PROCESSES = [
    ("qwen2", "tp2_pp2", {"tp": 2, "pp": 2}, {}),
    ("qwen2_tied", "sp2_pp2", {**_SP2, "pp": 2}, {}),
    ("qwen2", "tp2_dp2", _TP2, {}),
    ("qwen3_moe", "ep2_pp2", {"ep": 2, "pp": 2}, {}),
    ("qwen2", "sp2_cp2", {**_SP2, "cp": 2}, {}),
    ("qwen2", "cp4", {"cp": 4}, {}),
    ("qwen2", "pp4", {"pp": 4}, {}),
    ("qwen2", "dp4", _DP2, {"max_pack_tokens": 48}),
    ("qwen2", "pp2_dp2", _PP2, {}),
    ("qwen2", "cp2_dp2", _CP2, {}),
    ("qwen2", "cp2_pp2", {"cp": 2, "pp": 2}, {}),
    ("qwen2", "sp2_vpp2", {**_SP2, "pp": 2, "vpp": 2}, {}),
    ("qwen2", "vpp2_dp2", {"pp": 2, "vpp": 2}, {}),
    ("qwen2", "cp2_vpp2", {"cp": 2, "pp": 2, "vpp": 2}, {}),
    ("qwen3_moe", "ep4", {"ep": 4}, {}),
    ("qwen3_moe", "ep2_dp2", {"ep": 2}, {}),
    ("qwen3_moe", "ep2_cp2", {"ep": 2, "cp": 2}, {}),
    ("qwen3_moe", "sp2_pp2", {**_SP2, "pp": 2}, {}),
    ("qwen3_moe", "sp2_ep2_dp2", {**_SP2, "ep": 2}, {}),
    ("qwen3_moe", "cp2_pp2", {"cp": 2, "pp": 2}, {}),
]
# Units above the token; groups of four trajectories fit into packs of 160. (kind, name, layout, plan, objective)
_WHOLE = {"max_pack_tokens": 160}
UNITS = [
    ("qwen2", "sequence_probability_cp2", {"cp": 2}, {}, "sequence_probability"),
    ("qwen2", "dpo_cp2", {"cp": 2}, _WHOLE, "dpo"),
    ("qwen2", "dpo_dp2", _DP2, _WHOLE, "dpo"),
]
RECOMPUTED = [
    ("qwen2", "sp2_full", _SP2, {}, "released", {"recompute": "full"}),
    ("qwen2", "cp2_selective", _CP2, {}, "released", {"recompute": "selective"}),
    ("qwen3_moe", "ep2_full", {"ep": 2}, {}, "released", {"recompute": "full"}),
    ("qwen2", "vpp2_full", {"pp": 2, "vpp": 2}, {}, "released", {"recompute": "full"}),
    ("qwen2", "cp2_full", _CP2, {}, "released", {"recompute": "full"}),
    ("qwen3_moe", "pp2_full", _PP2, {}, "released", {"recompute": "full"}),
    ("qwen3_moe", "ep2_selective", {"ep": 2}, {}, "released", {"recompute": "selective"}),
]
BF16 = [
    (kind, f"{name}_bf16", layout, {}, "released", {"precision": "bf16"})
    for kind, name, layout in (
        *(("qwen2", name, layout) for name, layout in (("sp2", _SP2), ("pp2", _PP2), ("cp2", _CP2), ("dp2", _DP2))),
        ("qwen2", "vpp2", {"pp": 2, "vpp": 2}),
        ("qwen3_moe", "ep2", {"ep": 2}),
        ("qwen3_moe", "pp2", _PP2),
    )
]
ON_TWO = [*TWO_PROCESSES, *UNITS, *RECOMPUTED]
# Two updates with the optimizer's state spread over data- and context-parallel ranks.
UPDATED = {
    2: [("qwen2", "dp2", _DP2, {}), ("qwen2", "cp2", _CP2, {}), ("qwen3_moe", "dp2", _DP2, {})],
    4: [("qwen2", "dp4", _DP2, {}), ("qwen2_tied", "sp2_dp2", _SP2, {}), ("qwen3_moe", "ep2_dp2", {"ep": 2}, {})],
}
ONE_PROCESS = [
    # 1, 2 and 4 or more micro-batches from the same trajectories.
    ("qwen2", "one_pack", {}, {"max_pack_tokens": 1024}),
    ("qwen2", "two_packs", {}, {"max_pack_tokens": 240}),
    ("qwen2", "many_packs", {}, {"max_pack_tokens": 48}),
    ("qwen2", "other_alignment", {}, {"pack_multiple": 16}),
    *((kind, "shared", {}, {}) for kind in KINDS),
    ("qwen2", "separate_packs", {}, {"share_prompts": "never", "max_pack_tokens": 48}),
]


@pytest.fixture(scope="module")
def place():
    yield runtime.start(LayoutConfig(), seed=0)
    runtime.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, place) -> Path:
    """A store, and random weights of each architecture."""
    folder = tmp_path_factory.mktemp("layouts")
    write_toy_store(folder / "store")
    for kind in KINDS:
        torch.manual_seed(1)
        student = build_student(architecture(kind), toy_run())
        for parameter in student.models[0].parameters():
            # Also biases and norms, which start at 0 and 1; larger weights than usual, so that nothing is near zero.
            torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.1)
        write_shards(parameter_shards(student), folder / "weights" / kind, 0)
    return folder


@pytest.fixture(scope="module")
def expected(folder, place):
    """Gradients and metrics of one process, by architecture, at the toy run's own packs."""
    store = TrajectoryStore.open(folder / "store")
    found = {}
    wanted = [(kind, "released", {}) for kind in KINDS]
    wanted += [("qwen2", "sequence_probability", {}), ("qwen2", "dpo", {"max_pack_tokens": 240})]
    for kind, objective, plan in wanted:
        run = run_of({"objective": objective, "plan": plan | _SEPARATE})
        student, metrics, packs = gradient(run, kind, store, place, folder / "weights" / kind)
        assert packs > 1
        found[kind, objective] = (gradient_shards(student), metrics)
    return found


def _cases(parameters: list) -> list[dict]:
    return [
        {
            "name": f"{kind}-{name}",
            "kind": kind,
            "layout": layout,
            "plan": plan,
            "objective": more[0] if more else "released",
            "model": more[1] if more[1:] else {},
        }
        for kind, name, layout, plan, *more in parameters
    ]


@pytest.fixture(scope="module")
def written(folder) -> Path:
    for processes, gradients in ((1, ONE_PROCESS), (2, ON_TWO + BF16), (4, FOUR_PROCESSES)):
        run_ranks(
            "tests.distributed.layout_worker:write_all",
            processes,
            store=str(folder / "store"),
            weights=str(folder / "weights"),
            output=str(folder),
            gradients=_cases(gradients),
            updates=_cases(UPDATED.get(processes, [])),
        )
    return folder


def test_the_cases_share_prompts_unless_they_say_otherwise(folder):
    store = TrajectoryStore.open(folder / "store")
    for case in _cases(ONE_PROCESS + ON_TWO + FOUR_PROCESSES):
        run = run_of(case)
        shared = build_plan(store, run.plan, run.objective).manifest.counts["shared_prompt_tokens"]
        assert (shared == 0) == (case["plan"].get("share_prompts") == "never"), case["name"]


@pytest.mark.parametrize("case", _cases(ONE_PROCESS + ON_TWO + FOUR_PROCESSES), ids=lambda case: case["name"])
def test_loss_and_gradients_equal_one_process(case, written, expected):
    gradients, metrics = expected[case["kind"], case["objective"]]
    got = _metrics(written, case["name"])
    if case["name"].endswith("one_pack"):
        assert got["packs_per_rank"] == 1
    if case["name"].endswith("many_packs"):
        assert got["packs_per_rank"] >= 4
    for name in ("loss", "surrogate", "kl_term", "entropy_term", "entropy", "kl", "logp_right", "ratio_max"):
        if name == "kl" and case["objective"] == "dpo":
            continue  # beta = 0: not counted
        assert got[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-7), name
    if case["name"] in NAMING:
        assert got["largest_pack"] == _metrics(written, NAMING[0])["largest_pack"]
    whole = read_whole(written / "gradients" / case["name"])
    norm = torch.stack([shard.data.norm() for shard in gradients]).norm()
    assert norm > 0
    for shard in gradients:
        of_one, other = overlap(shard, whole)
        difference = (of_one - other).norm() / max(of_one.norm(), 1e-6 * norm)
        assert difference <= TOLERANCE, f"{shard.key} {shard.global_offset}: {difference:.2e}"


def _metrics(written: Path, name: str) -> dict:
    return json.loads((written / "gradients" / name / "metrics.json").read_text())


@pytest.mark.parametrize("case", _cases(BF16), ids=lambda case: case["name"])
def test_bf16_is_as_near_to_fp32_as_one_process_in_bf16(case, folder, place, written, expected):
    exact, _ = expected[case["kind"], "released"]
    run = run_of({"model": case["model"]})
    store = TrajectoryStore.open(folder / "store")
    alone, metrics, _ = gradient(run, case["kind"], store, place, folder / "weights" / case["kind"])
    bounds = [
        2 * float((one.data - alike.data).norm()) for one, alike in zip(exact, gradient_shards(alone), strict=True)
    ]
    whole = read_whole(written / "gradients" / case["name"])
    for shard, bound in zip(exact, bounds, strict=True):
        one, other = overlap(shard, whole)
        assert 0 < (one - other).norm() <= bound, shard.key
    assert _metrics(written, case["name"])["loss"] == pytest.approx(metrics["loss"], rel=1e-2)


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_tied", "qwen3_moe"])
def test_the_distributed_optimizer_updates_as_one_process(kind, folder, place, written):
    weights = folder / "weights" / kind
    before = read_whole(weights)
    student = updated(run_of({}), kind, TrajectoryStore.open(folder / "store"), place, weights)
    for case in _cases([case for cases in UPDATED.values() for case in cases]):
        if case["kind"] != kind:
            continue
        whole = read_whole(written / "updates" / case["name"])
        for shard in parameter_shards(student):
            of_one, of_layout = overlap(shard, whole)
            moved = (shard.data - overlap(shard, before)[1]).norm()
            assert moved > 0
            assert (of_one - of_layout).norm() <= 1e-4 * moved, f"{case['name']} {shard.key}"
