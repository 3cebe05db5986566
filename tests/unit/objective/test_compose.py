"""The composed loss: worked by hand, its identities and its metrics."""

import dataclasses
import functools
import math

import pytest
import torch

from megatron_offgrpo.config import ObjectiveConfig
from megatron_offgrpo.metrics import Max, Mean, Sum
from megatron_offgrpo.objective import advantages, divergences, surrogates, trajectory_surrogates
from megatron_offgrpo.objective.compose import (
    StackedMetrics,
    TokenTerms,
    offline_grpo_loss,
    results,
    to_metrics,
)
from megatron_offgrpo.objective.needs import needs_reference

LN2 = math.log(2.0)
OBJECTIVE = ObjectiveConfig(
    advantage=advantages.mean_only,
    surrogate=surrogates.linear,
    kl=divergences.k3,
    beta=0.5,
    entropy_coefficient=0.25,
)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def by_hand():
    """Trajectory 0 (right, A = 2, two rows), trajectory 1 (wrong, A = -1, one row), trajectory 2 masked (one row)."""
    return TokenTerms(
        logp=tensor(-LN2, -2 * LN2, -LN2, -3 * LN2).requires_grad_(),
        entropy=tensor(1.0, 2.0, 3.0, 9.0).requires_grad_(),
        mu=tensor(0.0, 0.0, -2 * LN2, 0.0),
        ref=tensor(-2 * LN2, -2 * LN2, 0.0, 0.0),
        on_policy=torch.zeros(4, dtype=torch.bool),
        advantage=tensor(2.0, 2.0, -1.0, 5.0),
        reward=tensor(1.0, 1.0, 0.0, 1.0),
        weight=tensor(0.1, 0.1, 0.2, 0.0),
        kl_weight=tensor(0.3, 0.3, 0.4, 0.0),
        trajectory=torch.tensor([0, 0, 1, 2]),
        trajectory_advantage=tensor(2.0, -1.0, 5.0),
        group_bounds=(0, 2, 3),
    )


# rho = 1/2, 1/4, 2: surrogate 0.1 * -2 * 1/2 + 0.1 * -2 * 1/4 + 0.2 * 1 * 2 = -0.1 - 0.05 + 0.4 = 0.25.
SURROGATE = 0.25
# x = -ln 2, 0, ln 2: k3 = ln 2 - 1/2, 0, 1 - ln 2; 0.5 * (0.3 * (ln 2 - 1/2) + 0.4 * (1 - ln 2)).
KL_TERM = 0.5 * (0.3 * (LN2 - 0.5) + 0.4 * (1 - LN2))
# -0.25 * (0.3 * 1 + 0.3 * 2 + 0.4 * 3)
ENTROPY_TERM = -0.525


def test_value_by_hand():
    loss, _ = offline_grpo_loss(by_hand(), OBJECTIVE)
    assert loss.item() == pytest.approx(SURROGATE + KL_TERM + ENTROPY_TERM, rel=1e-14)


def test_gradients_by_hand():
    terms = by_hand()
    offline_grpo_loss(terms, OBJECTIVE)[0].backward()
    # w * -A * rho + v * beta * (1 - exp(x)) with exp(x) = 1/2, 1, 2.
    expected = [-0.1 + 0.15 * 0.5, -0.05, 0.4 + 0.2 * -1.0, 0.0]
    torch.testing.assert_close(terms.logp.grad, tensor(*expected), rtol=1e-14, atol=1e-16)
    torch.testing.assert_close(terms.entropy.grad, -0.25 * terms.kl_weight, rtol=1e-14, atol=0)


def test_metrics_by_hand():
    metrics = to_metrics(offline_grpo_loss(by_hand(), OBJECTIVE)[1])
    types = {"loss": Sum, "surrogate": Sum, "kl": Mean, "logp_right": Mean, "ratio_max": Max}
    assert {name: type(metrics[name]) for name in types} == types
    expected = {
        "loss": SURROGATE + KL_TERM + ENTROPY_TERM,
        "surrogate": SURROGATE,
        "kl_term": KL_TERM,
        "entropy_term": ENTROPY_TERM,
        "tokens": 3,  # the masked row does not count
        "kl": 0.5 / 3,  # (ln 2 - 1/2) + 0 + (1 - ln 2) = 1/2
        "kl_clamped": 0,
        "entropy": 2,
        "ratio": 2.75 / 3,
        "clipped": 0,
        "logp_right": -1.5 * LN2,
        "logp_wrong": -LN2,
        "probability_right": 0.375,
        "probability_wrong": 0.5,
        "probability_margin": -0.125,
        "logp_margin": -0.5 * LN2,
        "ratio_max": 2,
        "max_abs_logp_difference": LN2,
    }
    assert results(metrics) == pytest.approx(expected, rel=1e-14)


def test_clipped_share_counts_rows_whose_surrogate_is_flat():
    # Rows 0 and 1 are right; row 2 (wrong) is flat once rho = 2 < 1 - epsilon, which epsilon = -2 makes true.
    clipped = dataclasses.replace(OBJECTIVE, surrogate=functools.partial(surrogates.clipped, epsilon=-2.0))
    metrics = to_metrics(offline_grpo_loss(by_hand(), clipped)[1])
    assert metrics["clipped"] == Mean(1, 3)
    # A row without advantage has no signal to clip.
    silent = dataclasses.replace(by_hand(), advantage=tensor(2.0, 0.0, -1.0, 5.0))
    assert to_metrics(offline_grpo_loss(silent, clipped)[1])["clipped"] == Mean(1, 2)
    assert to_metrics(offline_grpo_loss(silent, OBJECTIVE)[1])["clipped"] == Mean(0, 2)


def test_clamped_share_follows_the_bound_clamp():
    # k3 = 0.193, 0, 0.307
    for clamp, count in ((0.2, 1), (0.1, 2), (None, 0)):
        objective = dataclasses.replace(OBJECTIVE, kl=functools.partial(divergences.k3, clamp=clamp))
        assert to_metrics(offline_grpo_loss(by_hand(), objective)[1])["kl_clamped"] == Mean(count, 3)
    objective = dataclasses.replace(OBJECTIVE, kl=divergences.k1)
    assert to_metrics(offline_grpo_loss(by_hand(), objective)[1])["kl_clamped"] == Mean(0, 3)


def test_without_beta_and_entropy_only_the_surrogate_is_left():
    objective = dataclasses.replace(OBJECTIVE, beta=0.0, entropy_coefficient=0.0)
    terms = by_hand()
    loss, stacked = offline_grpo_loss(terms, objective)
    loss.backward()
    assert loss.item() == pytest.approx(SURROGATE, rel=1e-14)
    torch.testing.assert_close(terms.logp.grad, tensor(-0.1, -0.05, 0.4, 0.0), rtol=1e-14, atol=0)
    assert terms.entropy.grad is None
    metrics = to_metrics(stacked)
    assert not {"kl", "kl_clamped", "max_abs_logp_difference"} & set(metrics)
    assert metrics["kl_term"] == Sum(0.0)
    assert metrics["entropy"] == Mean(6.0, 3.0)


def random_terms(num_rows=24, num_trajectories=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def uniform():
        return torch.rand(num_rows, generator=generator, dtype=torch.float64).to(dtype)

    trajectory = torch.sort(torch.randint(num_trajectories, (num_rows,), generator=generator)).values
    reward = (torch.rand(num_trajectories, generator=generator) < 0.5).to(dtype)
    advantage = torch.randn(num_trajectories, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.rand(num_trajectories, generator=generator, dtype=torch.float64).to(dtype)
    return TokenTerms(
        logp=(-2 * uniform()).requires_grad_(),
        entropy=uniform().requires_grad_(),
        mu=-uniform() / 2,
        ref=-2 * uniform(),
        on_policy=trajectory % 2 == 0,
        advantage=advantage[trajectory],
        reward=reward[trajectory],
        weight=weight[trajectory],
        kl_weight=2 * weight[trajectory],
        trajectory=trajectory,
        trajectory_advantage=advantage,
        group_bounds=(0, 2, num_trajectories),
    )


WIDE_GSPO = functools.partial(trajectory_surrogates.gspo, epsilon_low=0.5, epsilon_high=0.5)


def select(terms, rows):
    tensors = {
        field.name: getattr(terms, field.name)[rows]
        for field in dataclasses.fields(terms)
        if field.name not in ("trajectory_advantage", "group_bounds")
    }
    return TokenTerms(**tensors, trajectory_advantage=terms.trajectory_advantage, group_bounds=terms.group_bounds)


@pytest.mark.parametrize("surrogate", [surrogates.linear, surrogates.clipped, WIDE_GSPO])
def test_splitting_into_micro_batches_changes_nothing(surrogate):
    objective = dataclasses.replace(OBJECTIVE, surrogate=surrogate)
    terms = random_terms()
    whole, stacked = offline_grpo_loss(terms, objective)
    expected = torch.autograd.grad(whole, terms.logp)[0]
    # Whole trajectories stay together, as in the plan.
    parts = [torch.isin(terms.trajectory, torch.tensor(ids)) for ids in ([0, 3], [1], [2, 4])]
    total, combined = torch.zeros((), dtype=torch.float64), None
    for part in parts:
        loss, metrics = offline_grpo_loss(select(terms, part), objective)
        total = total + loss
        combined = metrics if combined is None else combined.combine(metrics)
    torch.testing.assert_close(total, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(total, terms.logp)[0], expected, rtol=1e-12, atol=1e-15)
    assert results(to_metrics(combined)) == pytest.approx(results(to_metrics(stacked)), rel=1e-12)


def test_parts_of_a_step_combine():
    first = StackedMetrics(tensor(1.0, 2.0), tensor(3.0, -math.inf))
    second = StackedMetrics(tensor(10.0, 20.0), tensor(-math.inf, 4.0))
    for combined in (first.combine(second), second.combine(first)):
        assert combined.sums.tolist() == [11, 22]
        assert combined.maxima.tolist() == [3, 4]


def test_context_parallel_rows_need_only_the_summed_trajectories():
    """Rows of a trajectory split over two ranks: with summed trajectories the parts add up to the whole."""
    objective = dataclasses.replace(OBJECTIVE, surrogate=WIDE_GSPO)
    terms = random_terms()
    whole, _ = offline_grpo_loss(terms, objective)
    expected = torch.autograd.grad(whole, terms.logp)[0]
    even = torch.arange(len(terms.logp)) % 2 == 0

    def sums(rows):
        return torch.zeros(len(terms.trajectory_advantage), dtype=torch.float64).index_add(0, terms.trajectory, rows)

    total = torch.zeros((), dtype=torch.float64)
    for part in (even, ~even):
        # The surrogate asks for the sums of logp, of mu and of ones, in this order: for the loss, then for the metrics.
        queue = [sums(rows) for rows in 2 * (terms.logp, terms.mu, torch.ones_like(terms.mu))]
        loss, _ = offline_grpo_loss(select(terms, part), objective, lambda local, queue=queue: queue.pop(0))
        assert not queue
        total = total + loss
    torch.testing.assert_close(total, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(total, terms.logp)[0], expected, rtol=1e-12, atol=1e-15)


def test_which_objectives_read_the_reference():
    without_kl = dataclasses.replace(OBJECTIVE, beta=0.0)
    assert needs_reference(OBJECTIVE)
    assert not needs_reference(without_kl)
    bound = functools.partial(trajectory_surrogates.kto, temperature=0.2)
    assert needs_reference(dataclasses.replace(without_kl, surrogate=bound))


@pytest.mark.parametrize("reward", [0.0, 1.0])
@pytest.mark.parametrize("mode", [advantages.grpo, advantages.mean_only, advantages.rloo])
def test_equal_rewards_give_no_surrogate_gradient(mode, reward):
    terms = random_terms()
    rewards = torch.full((4,), reward, dtype=torch.float64).numpy()
    advantage = advantages.group_advantages(rewards, [0, 4], rewards > 2, mode, "none", 0.1)
    terms = dataclasses.replace(terms, advantage=torch.from_numpy(advantage)[terms.trajectory % 4])
    objective = dataclasses.replace(OBJECTIVE, beta=0.0, entropy_coefficient=0.0)
    loss, _ = offline_grpo_loss(terms, objective)
    assert (torch.autograd.grad(loss, terms.logp)[0] == 0).all()


@pytest.mark.parametrize("surrogate", [surrogates.linear, trajectory_surrogates.gspo, trajectory_surrogates.dpo])
def test_no_rows(surrogate):
    terms = select(random_terms(), slice(0, 0))
    terms = dataclasses.replace(terms, trajectory_advantage=terms.trajectory_advantage[:0], group_bounds=(0,))
    loss, stacked = offline_grpo_loss(terms, dataclasses.replace(OBJECTIVE, surrogate=surrogate))
    assert loss.item() == 0
    loss.backward()
    assert results(to_metrics(stacked)) == {
        "loss": 0.0,
        "surrogate": 0.0,
        "kl_term": 0.0,
        "entropy_term": 0.0,
        "tokens": 0.0,
    }


def test_works_in_fp32_and_where_gradients_are_off():
    terms = random_terms(dtype=torch.float32)
    loss, stacked = offline_grpo_loss(terms, OBJECTIVE)
    assert loss.dtype == torch.float32
    with torch.no_grad():
        silent, same = offline_grpo_loss(terms, OBJECTIVE)
    assert not silent.requires_grad
    assert silent.item() == loss.item()
    assert torch.equal(same.sums, stacked.sums)
    assert torch.equal(same.maxima, stacked.maxima)
    assert not stacked.sums.requires_grad


def test_a_new_token_objective_is_one_function():
    """As docs/objective.md describes it."""

    def squared(logp, mu, advantage, *, power=2.0):
        return -advantage * torch.exp(power * logp)

    objective = dataclasses.replace(OBJECTIVE, surrogate=functools.partial(squared, power=2.0), beta=0.0)
    objective = dataclasses.replace(objective, entropy_coefficient=0.0)
    # w * -A * p^2: -0.2 / 4 - 0.2 / 16 + 0.2 / 4
    assert offline_grpo_loss(by_hand(), objective)[0].item() == pytest.approx(-0.0125, rel=1e-13)
