"""The composed loss with each published objective: gradchecked, and on units above the token worked by hand."""

import dataclasses
import functools
import itertools
import math

import pytest
import torch

from megatron_offgrpo.objective import divergences, surrogates, trajectory_surrogates
from megatron_offgrpo.objective.compose import TokenTerms, offline_grpo_loss, results, to_metrics
from megatron_offgrpo.objective.needs import needs
from tests.unit.objective.test_compose import LN2, OBJECTIVE, WIDE_GSPO, random_terms, tensor
from tests.unit.objective.test_published import PUBLISHED

OBJECTIVES = {name: function() for name, function in PUBLISHED.items()}
DUAL_CLIP = functools.partial(surrogates.ppo, epsilon_high=0.28, dual_clip=3.0)
OBJECTIVES["dual clip"] = dataclasses.replace(OBJECTIVES["ppo"], surrogate=DUAL_CLIP)


def terms_to_clip():
    """20 rows of two groups, of 2 and 6 trajectories, on both sides of the bounds of every objective."""
    terms = random_terms(num_rows=20, num_trajectories=8)
    index = terms.trajectory
    # Mean log ratio of each trajectory; 1e-4 is inside GSPO's clip range. The rows lie around it.
    shift = tensor(1.2, -0.8, 1e-4, -1e-4, 0.8, -0.8, 1.8, 0.3)
    advantage = tensor(-1.0, 1.0, 0.5, -0.5, 2.0, -1.5, 1.5, 0.0)
    noise = terms.mu - torch.stack([terms.mu[index == k].mean() for k in range(8)])[index]
    mu = terms.logp.detach() - 2.5
    return dataclasses.replace(
        terms,
        logp=(mu + shift[index] + noise).requires_grad_(),
        mu=mu,
        # KTO's z is above 0 in the second group (in one of a single pair its gradient would cancel).
        ref=terms.ref - 4 * (index >= 2),
        on_policy=torch.isin(index, torch.tensor([0, 2, 4, 5])),
        advantage=advantage[index],
        trajectory_advantage=advantage,
    )


def kto_divergences(terms):
    """KTO's z of each group at the given log-probs."""
    x = (terms.logp - terms.ref).detach()
    x_K = [x[terms.trajectory == k].sum().item() for k in range(8)]
    return [max(0.0, sum(x_K[a:b]) / (b - a)) for a, b in itertools.pairwise(terms.group_bounds)]


def with_the_stopped_part_held(name, terms):
    """The surrogate of an objective with a stop-gradient, written from its paper with that part as a constant."""
    ratio, advantage_K = torch.exp(terms.logp - terms.mu).detach(), terms.trajectory_advantage
    if name == "cispo":
        factor = terms.advantage * ratio.clamp(max=5)
        return lambda logp, mu, advantage: -factor * logp
    if name in ("dft", "asft"):
        factor = torch.exp(terms.logp.detach()) * (terms.advantage > 0)
        return lambda logp, mu, advantage: -factor * logp
    if name == "topr":
        ratio_K = torch.stack([ratio[terms.trajectory == k].prod() for k in range(8)])
        factor_K = torch.where(advantage_K < 0, advantage_K * ratio_K.clamp(max=1), advantage_K)
        return needs("trajectory")(lambda logp, mu, advantage, num_tokens: -factor_K * logp)
    if name != "kto":
        return None
    z_G = kto_divergences(terms)

    @needs("trajectory", takes=("ref",))
    def kto(logp, mu, advantage, num_tokens, *, ref):
        values = []
        for z, start, end in zip(z_G, terms.group_bounds[:-1], terms.group_bounds[1:], strict=True):
            x, right, wrong = (logp - ref)[start:end], advantage[start:end] > 0, advantage[start:end] < 0
            losses = torch.cat([torch.sigmoid(0.1 * (z - x[right])), torch.sigmoid(0.1 * (x[wrong] - z))])
            values.append(losses.mean().expand(end - start))
        return torch.cat(values)

    return kto


def value_and_gradient(terms, objective):
    loss, _ = offline_grpo_loss(terms, objective)
    return loss.detach(), torch.autograd.grad(loss, terms.logp)[0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradcheck_of_each_published_objective(name):
    objective, terms = OBJECTIVES[name], terms_to_clip()
    held = dataclasses.replace(objective, surrogate=with_the_stopped_part_held(name, terms) or objective.surrogate)

    def loss(logp):
        return offline_grpo_loss(dataclasses.replace(terms, logp=logp), held)[0]

    assert torch.autograd.gradcheck(loss, (terms.logp,), atol=1e-7, rtol=1e-6)
    for got, expected in zip(value_and_gradient(terms, objective), value_and_gradient(terms, held), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


def test_the_rows_of_the_gradcheck_are_on_both_sides_of_every_bound():
    terms = terms_to_clip()
    ratio = torch.exp(terms.logp - terms.mu).detach()
    right, wrong, own = terms.advantage > 0, terms.advantage < 0, terms.on_policy
    for rows in (own, ~own):
        assert (rows & right).any()
        assert (rows & wrong).any()
    for rows in (right & own & (ratio > 1.2), wrong & own & (ratio < 0.8), wrong & (ratio > 3), wrong & (ratio < 0.8)):
        assert rows.any()
    assert 0 < (ratio[terms.advantage != 0] > 5).double().mean() < 1
    for name in ("blog", "ppo", "dual clip", "luffy", "gspo"):
        assert 0 < results(to_metrics(offline_grpo_loss(terms, OBJECTIVES[name])[1]))["clipped"] < 1
    k3 = torch.exp(terms.ref - terms.logp) - 1 - terms.ref + terms.logp
    assert 0 < (k3 > 10).double().mean() < 1
    first, second = kto_divergences(terms)
    assert first == 0
    assert second > 0
    # TOPR: wrong trajectories less and more probable than under the behaviour policy.
    log_ratio_K = torch.zeros(8, dtype=torch.float64).index_add(0, terms.trajectory, ratio.log())
    assert {bool(value > 0) for value in log_ratio_K[terms.trajectory_advantage < 0]} == {True, False}


@pytest.mark.parametrize("kl", [divergences.k1, divergences.k2, divergences.k3])
@pytest.mark.parametrize(
    "surrogate", [surrogates.linear, surrogates.shaped, surrogates.clipped, surrogates.sft, WIDE_GSPO]
)
def test_gradcheck_with_each_divergence(surrogate, kl):
    objective = dataclasses.replace(OBJECTIVE, surrogate=surrogate, kl=kl)
    terms = random_terms()

    def loss(logp, entropy):
        return offline_grpo_loss(dataclasses.replace(terms, logp=logp, entropy=entropy), objective)[0]

    assert torch.autograd.gradcheck(loss, (terms.logp, terms.entropy))


def test_gspo_with_sequence_weights_is_the_mean_over_trajectories():
    # Two trajectories of 2 and 1 tokens, B = 2: weights 1/4, 1/4, 1/2. Log ratios (ln 2, 0) and 0: s = sqrt 2 and 1.
    zeros = torch.zeros(3, dtype=torch.float64)
    terms = TokenTerms(
        logp=tensor(-LN2, -LN2, -1.0),
        entropy=zeros,
        mu=tensor(-2 * LN2, -LN2, -1.0),
        ref=zeros,
        advantage=tensor(1.0, 1.0, -3.0),
        reward=tensor(1.0, 1.0, 0.0),
        weight=tensor(0.25, 0.25, 0.5),
        kl_weight=zeros,
        on_policy=torch.zeros(3, dtype=torch.bool),
        trajectory=torch.tensor([0, 0, 1]),
        trajectory_advantage=tensor(1.0, -3.0),
        group_bounds=(0, 2),
    )
    objective = dataclasses.replace(OBJECTIVE, surrogate=WIDE_GSPO, beta=0.0)
    assert offline_grpo_loss(terms, objective)[0].item() == pytest.approx((-math.sqrt(2) + 3) / 2, rel=1e-14)


def test_dpo_with_group_weights_is_the_mean_over_groups():
    # Group 0: right x = 2, wrong x = -1 (two tokens of -1/2); group 1: one right trajectory, no pair. Tokens 1 + 2 and
    # 1, two groups: weights 1/6 and 1/2.
    terms = TokenTerms(
        logp=tensor(-1.0, -1.5, -1.5, -2.0).requires_grad_(),
        entropy=tensor(0.0, 0.0, 0.0, 0.0),
        mu=tensor(0.0, 0.0, 0.0, 0.0),
        ref=tensor(-3.0, -1.0, -1.0, -2.5),
        on_policy=torch.zeros(4, dtype=torch.bool),
        advantage=tensor(0.5, -0.5, -0.5, 1.0),
        reward=tensor(1.0, 0.0, 0.0, 1.0),
        weight=tensor(1 / 6, 1 / 6, 1 / 6, 1 / 2),
        kl_weight=tensor(0.0, 0.0, 0.0, 0.0),
        trajectory=torch.tensor([0, 1, 1, 2]),
        trajectory_advantage=tensor(0.5, -0.5, 1.0),
        group_bounds=(0, 2, 3),
    )
    objective = dataclasses.replace(OBJECTIVE, surrogate=trajectory_surrogates.dpo, beta=0.0, entropy_coefficient=0.0)
    loss, _ = offline_grpo_loss(terms, objective)
    # -log sigmoid(0.1 * 3) / 2 groups
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.3)) / 2, rel=1e-14)
    slope = 0.1 / (1 + math.exp(0.3)) / 2
    gradient = torch.autograd.grad(loss, terms.logp)[0]
    assert gradient.tolist() == pytest.approx([-slope, slope, slope, 0.0], rel=1e-13)
