"""Surrogates on whole trajectories and groups: worked out by hand, gradchecked, and their identities."""

import functools
import math

import pytest
import torch

from megatron_offgrpo.objective import trajectory_surrogates
from megatron_offgrpo.objective.needs import needs_of
from megatron_offgrpo.objective.trajectory_surrogates import dpo, gspo, kto, sequence_probability, topr

LN2 = math.log(2.0)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def value_and_gradient(function, logp, mu, advantage, num_tokens, **extra):
    """Of one trajectory."""
    logp = tensor(logp).requires_grad_()
    value = function(logp, tensor(mu), tensor(advantage), tensor(num_tokens), **extra)
    (gradient,) = torch.autograd.grad(value.sum(), logp)
    return value.item(), gradient.item()


def test_gspo_weighs_with_the_mean_log_ratio():
    # Four tokens, sum of log ratios 4 ln 2: s = 2 > 1 + 0.5. A = 1: min(2, 1.5), flat. A = -1: -min(-2, -1.5) = 2.
    function = functools.partial(gspo, epsilon_low=0.5, epsilon_high=0.5)
    assert value_and_gradient(function, 4 * LN2, 0.0, 1.0, 4) == (pytest.approx(-1.5), 0.0)
    # ds/dlogp = s / 4 = 1/2.
    assert value_and_gradient(function, 4 * LN2, 0.0, -1.0, 4) == (pytest.approx(2.0), pytest.approx(0.5))
    # s = 1/4 < 1/2 and A = -1: -min(-1/4, -1/2) = 1/2, flat.
    assert value_and_gradient(function, -8 * LN2, 0.0, -1.0, 4) == (pytest.approx(0.5), 0.0)
    # s = 1 at the behaviour policy, whatever the clip: value -A, gradient -A / 4.
    assert value_and_gradient(gspo, -3.0, -3.0, 2.0, 4) == (pytest.approx(-2.0), pytest.approx(-0.5))


def test_sequence_probability():
    # Two tokens with sum -2 ln 2: p = 1/2, dp/dlogp = p / 2. mu is not used.
    for mu in (0.0, -5.0):
        got = value_and_gradient(sequence_probability, -2 * LN2, mu, -3.0, 2)
        assert got == (pytest.approx(1.5, rel=1e-14), pytest.approx(0.75, rel=1e-14))


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_sequence_probability_with_signed_advantages_is_the_loss_of_pcl_reasoner(reward):
    # r (1 - p) + (1 - r) p = r - (2 r - 1) p.
    p = math.exp(-0.7 / 5)
    value, _ = value_and_gradient(sequence_probability, -0.7, 0.0, 2 * reward - 1, 5)
    assert reward + value == pytest.approx(reward * (1 - p) + (1 - reward) * p, rel=1e-14)


def test_topr():
    # Right: -A logp, whatever the ratio.
    assert value_and_gradient(topr, -3.0, -1.0, 2.0, 4) == (pytest.approx(6.0), pytest.approx(-2.0))
    # Wrong, logp - mu = -ln 4: weight 1/4; -(-2)(1/4)(logp), gradient 2 / 4, the weight is not differentiated.
    logp = -1.0 - 2 * LN2
    assert value_and_gradient(topr, logp, -1.0, -2.0, 4) == (pytest.approx(0.5 * logp), pytest.approx(0.5))
    # Wrong and likelier than under the behaviour policy: weight 1.
    assert value_and_gradient(topr, -1.0, -3.0, -2.0, 4) == (pytest.approx(-2.0), pytest.approx(2.0))


def group():
    """Two right, one wrong, one without advantage: logp, mu, A, tokens, ref."""
    logp = tensor(-1.0, -2.0, -3.0, -4.0).requires_grad_()
    return (logp, tensor(0.0, 0.0, 0.0, 0.0), tensor(0.5, 0.5, -1.0, 0.0), tensor(1, 2, 3, 4)), tensor(-2, -2, -1, -9)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_dpo_averages_over_all_pairs_of_the_group():
    arguments, ref = group()
    value = dpo(*arguments, ref=ref, temperature=0.5)
    # x = 1, 0, -2: margins 3 and 2, halved by the temperature.
    assert value.item() == pytest.approx(-(math.log(sigmoid(1.5)) + math.log(sigmoid(1.0))) / 2, rel=1e-14)
    first, second = 0.5 * sigmoid(-1.5) / 2, 0.5 * sigmoid(-1.0) / 2
    gradient = torch.autograd.grad(value, arguments[0])[0].tolist()
    assert gradient == pytest.approx([-first, -second, first + second, 0.0], rel=1e-13)


def test_kto_weighs_right_and_wrong_members():
    arguments, ref = group()
    value = kto(*arguments, ref=ref, temperature=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    # x = 1, 0, -2, 5: z = 1. Three members have an advantage.
    losses = [2 * (1 - sigmoid(0.0)), 2 * (1 - sigmoid(-0.5)), 3 * (1 - sigmoid(-0.5 * (-2 - 1)))]
    assert value.item() == pytest.approx(sum(losses) / 3, rel=1e-14)
    slopes = [-2 * 0.5 * 0.25, -2 * 0.5 * sigmoid(-0.5) * sigmoid(0.5), 3 * 0.5 * sigmoid(1.5) * sigmoid(-1.5), 0.0]
    gradient = torch.autograd.grad(value, arguments[0])[0].tolist()
    assert gradient == pytest.approx([slope / 3 for slope in slopes], rel=1e-13)


def test_kto_takes_no_negative_divergence():
    arguments, _ = group()
    # x = -1 everywhere: z = 0, not -1.
    value = kto(*arguments, ref=arguments[0].detach() + 1, temperature=1.0)
    assert value.item() == pytest.approx((2 * (1 - sigmoid(-1.0)) + (1 - sigmoid(1.0))) / 3, rel=1e-14)


@pytest.mark.parametrize("function", [dpo, kto])
@pytest.mark.parametrize("sign", [0.0, 1.0])
def test_a_group_without_pairs(function, sign):
    logp = tensor(-1.0, -2.0).requires_grad_()
    value = function(logp, tensor(0, 0), tensor(sign, sign), tensor(1, 1), ref=tensor(-1, -2))
    # KTO learns from right trajectories alone: x = 0 = z gives 1/2.
    expected = 0.5 if function is kto and sign else 0.0
    assert value.item() == expected
    gradient = torch.autograd.grad(value, logp)[0]
    assert (gradient != 0).any() == bool(expected)


@pytest.mark.parametrize("name", ["sequence_probability", "dpo", "kto"])
def test_gradcheck(name):
    function = getattr(trajectory_surrogates, name)
    generator = torch.Generator().manual_seed(1)
    logp = -2 * torch.rand(6, generator=generator, dtype=torch.float64)
    mu, ref = logp + 0.1, -torch.rand(6, generator=generator, dtype=torch.float64) - 2.5
    advantage = tensor(1, 0.5, -1, -0.5, 0, 2)
    extra = {"ref": ref} if "ref" in needs_of(function).takes else {}
    # kto does not differentiate z; here the mean of x is below 0 and z = 0, so there is nothing to leave out.
    extra = {"ref": ref.abs()} if name == "kto" else extra
    assert torch.autograd.gradcheck(
        lambda values: function(values, mu, advantage, torch.full_like(mu, 3.0), **extra), (logp.requires_grad_(),)
    )


def gradient_of(function, logp):
    return torch.autograd.grad(function(logp).sum(), logp)[0]


@pytest.mark.parametrize(("low", "high"), [(3e-4, 4e-4), (0.4, 0.5)])
def test_gradcheck_of_gspo_on_every_branch(low, high):
    # Right, then wrong: ratios below, inside (twice) and above the clip range, over 3, 1, 4 and 2 tokens.
    ratio = tensor(0.3, 1 - low / 2, 1 + high / 2, 2.5).repeat(2)
    num_tokens, advantage = tensor(3, 1, 4, 2).repeat(2), tensor(1, 0.5, 2, 1.5, -1, -0.5, -2, -1.5)
    mu = torch.linspace(-30, -20, 8, dtype=torch.float64)
    logp = (mu + num_tokens * ratio.log()).requires_grad_()

    def function(logp):
        return gspo(logp, mu, advantage, num_tokens, epsilon_low=low, epsilon_high=high)

    value, gradient = -advantage * ratio, -advantage * ratio / num_tokens
    # Clipped: right and above, wrong and below.
    value[3], value[4] = -1.5 * (1 + high), 1 - low
    gradient[3] = gradient[4] = 0
    torch.testing.assert_close(function(logp).detach(), value, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient_of(function, logp), gradient, rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(function, (logp,), atol=1e-7, rtol=1e-6)


def test_gradcheck_of_topr_with_its_taper_held_constant():
    # Right and wrong, each less and more probable than under the behaviour policy: only the first wrong one is tapered.
    logp, mu = tensor(-5.0, -2.0, -4.5, -1.0).requires_grad_(), tensor(-4.0, -4.0, -4.0, -4.0)
    advantage, num_tokens = tensor(1.5, 0.5, -2.0, -1.0), tensor(3, 1, 4, 2)
    factor = advantage * tensor(1.0, 1.0, math.exp(-0.5), 1.0)

    def function(logp):
        return topr(logp, mu, advantage, num_tokens)

    def held(logp):
        return -factor * logp

    assert torch.autograd.gradcheck(held, (logp,), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(function(logp), held(logp), rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient_of(function, logp), gradient_of(held, logp), rtol=1e-14, atol=0)


def test_gradcheck_of_kto_with_its_divergence_held_constant():
    arguments, ref = group()
    logp, others = arguments[0], arguments[1:]

    def function(logp):
        return kto(logp, *others, ref=ref, temperature=0.5, desirable_weight=2.0, undesirable_weight=3.0)

    def held(logp):
        # x = 1, 0, -2, 5: z = 1 > 0. Two right members, one wrong, three in all.
        first, second, wrong, _ = logp - ref
        gains = torch.sigmoid(0.5 * torch.stack([first - 1.0, second - 1.0, 1.0 - wrong]))
        return (tensor(2, 2, 3) * (1 - gains)).sum() / 3

    assert torch.autograd.gradcheck(held, (logp,), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(function(logp), held(logp), rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient_of(function, logp), gradient_of(held, logp), rtol=1e-13, atol=1e-16)
