"""The whole objective against Transformers and plain autograd: loss and every gradient, packed against one by one.

The project's side is Megatron's schedule over the packs of one step. The other side runs each trajectory alone through
the Hugging Face model it was converted from and writes the formulas out, from advantages and token weights to
surrogate, KL and entropy.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoints_conversion import hf_to_megatron
from checkpoints_conversion.planning import layout_of
from megatron_offgrpo.config import LayoutConfig, ObjectiveConfig
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.model.hf_config import read_architecture
from megatron_offgrpo.objective import advantages, divergences, surrogates
from megatron_offgrpo.objective.compose import results, to_metrics
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.training.batch import Batch, build_batch, members_of
from megatron_offgrpo.training.checkpoint import load_weights
from megatron_offgrpo.training.step import compute_gradients
from megatron_offgrpo.training.student import Student, build_student
from recipes.objectives import blog, released
from tests.distributed.shards import gradient_shards
from tests.distributed.toy import VOCAB_SIZE, toy_run, write_hf_model, write_toy_store

TOLERANCE = 1e-5
KINDS = ("qwen2", "qwen2_tied", "qwen3", "qwen3_moe")
MAX_RESPONSE_TOKENS = 24
CLIP = 0.005
"""1 - epsilon of the clipped case: near the random model's ratios, so that tokens lie on both sides."""


@dataclass(frozen=True)
class Case:
    """An objective, and the same written out: rewards [G] -> A [G]; (rho, A) -> surrogate; (|o|, tokens, B) -> w."""

    objective: ObjectiveConfig
    advantages: Callable
    surrogate: Callable
    weight: Callable
    kl_weight: Callable


def _mean_only_set(r):
    return np.full(len(r), 0.1) if all(r == 1) else r - sum(r) / len(r)


def _standardised_add(r):
    mean = sum(r) / len(r)
    standard_deviation = (sum((r - mean) ** 2) / (len(r) - 1)) ** 0.5
    return (r - mean) / (standard_deviation + 1e-6) + (0.1 if all(r == 1) else 0.0)


def _constant(length, tokens, num):
    return 1 / (num * MAX_RESPONSE_TOKENS)


def _token(length, tokens, num):
    return 1 / tokens


def _sequence(length, tokens, num):
    return 1 / (num * length)


CASES = {
    "released": Case(
        replace(released(), max_response_tokens=MAX_RESPONSE_TOKENS),
        _mean_only_set,
        lambda rho, a: -a * rho,
        _constant,
        _constant,
    ),
    "blog": Case(
        replace(blog(), surrogate=partial(surrogates.clipped, epsilon=1 - CLIP)),
        _standardised_add,
        lambda rho, a: -torch.minimum(rho * a, rho.clamp(min=CLIP) * a),
        _sequence,
        _sequence,
    ),
    "luffy": Case(
        ObjectiveConfig(
            advantage=partial(advantages.grpo, eps=1e-6),
            surrogate=partial(surrogates.shaped, gamma=0.1),
            kl=partial(divergences.k3, clamp=10.0),
            all_positive="add",
            all_positive_bias=0.1,
            beta=0.05,
            entropy_coefficient=0.003,
            weight="token",
            kl_weight="constant",
            max_response_tokens=MAX_RESPONSE_TOKENS,
        ),
        _standardised_add,
        lambda rho, a: -a * rho / (rho + 0.1),
        _token,
        _constant,
    ),
}


def reference(trajectory: int, length: int) -> np.ndarray:
    """Log-probs near a random model's, every seventh far above, where the KL estimate is clamped."""
    t = trajectory + np.arange(length)
    return (-5.7 + 0.3 * np.sin(t) + 4.0 * (t % 7 == 0)).astype(np.float32)


@pytest.fixture(scope="module")
def place():
    yield runtime.start(LayoutConfig(), seed=0)
    runtime.stop()


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TrajectoryStore:
    return write_toy_store(tmp_path_factory.mktemp("objective") / "store")


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory, place) -> tuple[Path, Student]:
    """A random Hugging Face model, and the student with its weights."""
    folder = tmp_path_factory.mktemp(request.param)
    write_hf_model(folder / "hf", request.param)
    centre_biases(folder / "hf")
    hf_to_megatron(folder / "hf", folder / "megatron")
    student = build_student(read_architecture(folder / "hf"), toy_run(), distributed_optimizer=False)
    load_weights(student, folder / "megatron" / "release")
    return folder / "hf", student


def centre_biases(hf: Path) -> None:
    """Moves the toy model's biases from around 1 to around 0.

    With a value bias of 1 each attention output is nearly a constant, and the gradients of query and key are what
    cancellation leaves: there Transformers' own fp32 gradients lie up to 1.9e-5 from its float64 ones. Without, no
    tensor is off by more than 3e-6.
    """
    tensors = load_file(hf / "model.safetensors")
    moved = {name: tensor - 1 if name.endswith(".bias") else tensor for name, tensor in tensors.items()}
    save_file(moved, hf / "model.safetensors", {"format": "pt"})


def project_side(hf: Path, student: Student, store: TrajectoryStore, case: Case, place: runtime.Placement) -> tuple:
    """Loss and gradients by Hugging Face names, of one step over the whole store in several packs."""
    run = replace(toy_run(groups_per_step=store.num_groups), objective=case.objective)
    plan = build_plan(store, run.plan, run.objective)
    packs = list(plan.packs_of_step(0))
    assert plan.num_steps == 1
    assert 1 < len(packs) < store.num_trajectories

    def make_batch(pack: int | None) -> Batch:
        return build_batch(
            store,
            members_of(plan, pack),
            pack=pack,
            pack_multiple=run.plan.pack_multiple,
            reference=lambda t: reference(t, int(store.response_lengths[t])),
            device=place.device,
        )

    stacked, bad = compute_gradients(student, packs, make_batch, run, place)
    assert bad is None
    return results(to_metrics(stacked))["loss"], hf_gradients(hf, student)


def hf_gradients(hf: Path, student: Student) -> dict[str, torch.Tensor]:
    """The converter's way back is linear (it orders and splits rows), so it holds for gradients too."""
    found = {(shard.key, shard.global_offset): shard.data for shard in gradient_shards(student)}
    layout, gradients = layout_of(hf), {}
    for move in layout.moves:
        data = found.pop((move.region.key, move.region.offsets))
        if move.padded:
            assert (data[VOCAB_SIZE:] == 0).all(), "padding rows have no gradient"
            data = data[:VOCAB_SIZE]
        tensors = move.op.to_hf(data.reshape(move.region.shape), layout.dims)
        gradients |= {name: tensor.clone() for name, tensor in zip(move.names, tensors, strict=True)}
    assert not found, "every gradient of the student has a name"
    return gradients


def hf_side(hf: Path, store: TrajectoryStore, case: Case) -> tuple:
    """Loss, gradients, and the log-ratios and advantages of all tokens."""
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    num, tokens = store.num_trajectories, int(store.response_lengths.sum())
    trajectory, loss, seen = 0, 0.0, []
    for group in range(store.num_groups):
        row = store.row(group)
        group_advantages = case.advantages(np.array(row.rewards))
        for response, mu, a in zip(row.response_ids, row.behaviour_logprobs, group_advantages, strict=True):
            logits = model(torch.tensor([row.prompt_ids + response])).logits[0].float()
            # The token at place t is predicted at t - 1.
            first, length = len(row.prompt_ids) - 1, len(response)
            log_p = torch.log_softmax(logits[first : first + length], dim=-1)
            logp = log_p[range(length), response]
            entropy = -(log_p.exp() * log_p).sum(-1)
            ref = torch.from_numpy(reference(trajectory, length))
            x = ref - logp
            k3 = torch.clamp(torch.exp(x) - 1 - x, -10, 10)
            log_rho = logp - torch.tensor(mu if mu is not None else [0.0] * length)
            a = torch.tensor(float(a))
            w, v = case.weight(length, tokens, num), case.kl_weight(length, tokens, num)
            beta, c = case.objective.beta, case.objective.entropy_coefficient
            part = (w * case.surrogate(log_rho.exp(), a) + v * (beta * k3 - c * entropy)).sum()
            part.backward()
            loss += float(part.detach())
            seen.append((log_rho.detach(), a.expand(length), k3.detach(), mu is not None))
            trajectory += 1
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients |= unfused(name, parameter.grad)
    return loss, gradients, seen


def unfused(name: str, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    """Names as in the safetensors files: Transformers fuses the experts of a layer when it loads them."""
    module, _, fused = name.partition(".experts.")
    if not fused:
        return {name: gradient}
    parts = {}
    for number, expert in enumerate(gradient):
        if fused == "gate_up_proj":
            parts[f"{module}.experts.{number}.gate_proj.weight"] = expert[: len(expert) // 2]
            parts[f"{module}.experts.{number}.up_proj.weight"] = expert[len(expert) // 2 :]
        else:
            parts[f"{module}.experts.{number}.{fused}.weight"] = expert
    return parts


@pytest.mark.parametrize("name", list(CASES))
def test_loss_and_gradients_equal_transformers(name, model, store, place):
    hf, student = model
    loss, gradients = project_side(hf, student, store, CASES[name], place)
    expected_loss, expected, seen = hf_side(hf, store, CASES[name])
    _assert_every_branch_was_taken(name, seen)
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
    assert gradients.keys() == expected.keys()
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    for key, wanted in expected.items():
        difference = float((gradients[key] - wanted).norm() / max(wanted.norm(), 1e-6 * norm))
        assert difference <= TOLERANCE, f"{key}: {difference:.2e}"


def _assert_every_branch_was_taken(name: str, seen: list) -> None:
    log_rho, a, k3 = (torch.cat([entry[i] for entry in seen]) for i in range(3))
    assert (k3 == 10).any()
    assert (k3 < 10).any()
    assert {known for *_, known in seen} == {True, False}, "with and without behaviour log-probs"
    assert (a > 0).any()
    assert (a < 0).any()
    if name == "blog":
        below = log_rho.exp()[a < 0] < CLIP
        assert below.any()
        assert not below.all()
