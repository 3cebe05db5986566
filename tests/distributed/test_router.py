"""The router of a mixture of experts: frozen it stays, balanced it evens out; the same in every layout."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_conversion import hf_to_megatron, megatron_to_hf
from checkpoints_conversion.safe_metadata import read_metadata
from megatron_offgrpo.config import LayoutConfig, ModelConfig, with_values
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.model.gpt import transformer_config
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.planning.plan_files import save_plan
from megatron_offgrpo.training.batch import Batch, build_batch, members_of
from megatron_offgrpo.training.checkpoint import load_weights
from megatron_offgrpo.training.run_folder import read_metrics
from megatron_offgrpo.training.step import train_step
from megatron_offgrpo.training.student import build_student
from tests.distributed import format_worker, router_worker
from tests.distributed.harness import run_ranks
from tests.distributed.shards import parameter_shards, write_shards
from tests.distributed.toy import architecture, toy_run, write_hf_model, write_toy_store

LAYOUTS = {"dp2": {}, "ep2": {"ep": 2}, "cp2": {"cp": 2}, "sp2_ep2": {"tp": 2, "sequence_parallel": True, "ep": 2}}


@pytest.fixture(scope="module")
def place():
    yield runtime.start(LayoutConfig(), seed=0)
    runtime.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, place) -> Path:
    """A store, a random mixture of experts, and a plan of four steps."""
    folder = tmp_path_factory.mktemp("router")
    store = write_toy_store(folder / "store")
    write_hf_model(folder / "hf", "qwen3_moe")
    hf_to_megatron(folder / "hf", folder / "megatron")
    run = format_worker.run_of(folder, "")
    save_plan(build_plan(store, run.plan, run.objective), run.paths.plan)
    return folder


def test_a_frozen_router_stays_to_the_bit_and_all_else_moves(folder, place, tmp_path):
    run = format_worker.run_of(folder, tmp_path / "train", model={"router": "frozen"})
    assert format_worker.train(run, place, 2) is False
    # Sharded, then resumed, then reshardable: the optimizer knows nothing of the router in either.
    assert format_worker.train(run, place) is True
    megatron_to_hf(tmp_path / "train" / "checkpoints", folder / "hf", tmp_path / "export")
    before, after = load_file(folder / "hf" / "model.safetensors"), load_file(tmp_path / "export" / "model.safetensors")
    unmoved = {name for name in before if torch.equal(before[name], after[name])}
    assert unmoved == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(4)}
    keys = read_metadata(tmp_path / "train" / "checkpoints" / "iter_0000004").state_dict_metadata
    routers = [key for key in keys if "router" in key]
    assert routers == ["decoder.layers.mlp.router.weight"]
    undisturbed = format_worker.run_of(folder, tmp_path / "whole", model={"router": "frozen"})
    assert format_worker.train(undisturbed, place) is True
    losses = [[step["loss"] for step in read_metrics(tmp_path / name)] for name in ("train", "whole")]
    assert losses[0] == losses[1]


def test_the_balancing_loss_by_hand(place):
    """Six tokens, two of them padding; four experts, two a token."""
    run = with_values(toy_run(), model={"router": "balanced", "balance_coefficient": 0.5})
    student = build_student(architecture("qwen3_moe"), run)
    student.balance_over(20)
    router = student.models[0].routers[0]
    hidden = torch.randn(6, 1, 32, generator=torch.Generator().manual_seed(0))
    padding = torch.tensor([False, False, True, False, True, False])[:, None]
    probs, _ = router(hidden, padding)
    # Nothing but the balancing loss reaches the weight.
    (found,) = torch.autograd.grad((probs * 0).sum(), router.weight)

    weight = router.weight.detach().clone().requires_grad_()
    p = torch.softmax(hidden[~padding].reshape(4, 32) @ weight.T, dim=-1)
    chosen = Counter(p.topk(2).indices.flatten().tolist())
    shares = torch.tensor([chosen[expert] / 8 for expert in range(4)])
    loss = 0.5 * (4 / 20) * 4 * (shares * p.mean(dim=0)).sum()
    (expected,) = torch.autograd.grad(loss, weight)
    assert expected.norm() > 0
    torch.testing.assert_close(found, expected)


def test_a_pack_without_weight_changes_nothing(place):
    run = with_values(toy_run(), model={"router": "balanced", "balance_coefficient": 0.5})
    router = build_student(architecture("qwen3_moe"), run).models[0].routers[0]
    probs, _ = router(torch.randn(6, 1, 32), torch.ones(6, 1, dtype=torch.bool))
    (gradient,) = torch.autograd.grad((probs * 0).sum(), router.weight)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_skewed_router_becomes_more_even_and_zero_weight_packs_change_nothing(folder, place, recompute):
    def imbalance_after(router: str, zero_weight_packs: int) -> tuple[list[float], torch.Tensor]:
        """Copies of the busiest expert over the mean, before and after eight steps; and the routers' weights then."""
        run = format_worker.run_of(folder, "", model={"router": router, "balance_coefficient": 1.0})
        run = with_values(run, model={"recompute": recompute}, optimizer={"lr": 1e-3})
        student = build_student(architecture("qwen3_moe"), run)
        load_weights(student, folder / "megatron" / "release")
        store = TrajectoryStore.open(folder / "store")
        plan = build_plan(store, run.plan, run.objective)
        copies = torch.zeros(4)

        def count(module: torch.nn.Module, inputs: tuple, output: tuple) -> None:
            copies.add_(output[1].sum(dim=0))

        for module in student.models[0].routers:
            module.register_forward_hook(count)

        def make_batch(pack: int | None) -> Batch:
            members = [] if pack is None else members_of(plan, pack)
            return build_batch(store, members, pack=pack, pack_multiple=8, reference=None, device=place.device)

        packs = [*plan.packs_of_step(0), *[None] * zero_weight_packs]
        student.balance_over(int(plan.response_tokens[plan.step == 0].sum()))
        with torch.no_grad():
            # What all tokens have in common speaks for the first expert.
            student.models[0].embedding.word_embeddings.weight += 0.05
            for module in student.models[0].routers:
                module.weight[0] += 0.05
        student.optimizer.reload_model_params()
        found = []
        for _ in range(9):
            copies.zero_()
            train_step(student, packs, make_batch, run, place, 1e-3)
            found.append(float(copies.max() / copies.mean()))
        return found, torch.stack([module.weight.detach().clone() for module in student.models[0].routers])

    balanced, weights = imbalance_after("balanced", 0)
    trained, _ = imbalance_after("trained", 0)
    assert balanced[0] == trained[0] > 1.3
    assert balanced[-1] - 1 < 0.7 * (trained[-1] - 1)
    _, with_zero_weight_packs = imbalance_after("balanced", 2)
    assert torch.equal(weights, with_zero_weight_packs)


def test_the_balancing_loss_is_the_same_in_every_layout(folder, place, tmp_path):
    torch.manual_seed(1)
    student = build_student(architecture("qwen3_moe"), toy_run())
    for parameter in student.models[0].parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.1)
    weights = tmp_path / "weights"
    write_shards(parameter_shards(student), weights, 0)
    balanced, trained = (
        router_worker.router_gradients(router_worker.run_of({}, router), folder / "store", place, weights)
        for router in ("balanced", "trained")
    )
    assert (balanced - trained).norm() > 0.1 * trained.norm()
    run_ranks(
        "tests.distributed.router_worker:write_gradients",
        2,
        store=str(folder / "store"),
        weights=str(weights),
        output=str(tmp_path),
        layouts=LAYOUTS,
    )
    for name in LAYOUTS:
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert (found - balanced).norm() <= 1e-5 * balanced.norm(), name


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("qwen2", ModelConfig(router="frozen"), r"model\.router: a dense model has no router"),
        ("qwen3_moe", ModelConfig(router="balanced", balance_coefficient=0.0), r"model\.balance_coefficient.*above 0"),
    ],
)
def test_refusals(kind, model, message):
    with pytest.raises(ConfigError, match=message):
        transformer_config(architecture(kind), LayoutConfig(), model)
