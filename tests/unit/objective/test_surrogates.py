"""Surrogates worked out by hand (value and derivative in logp), gradchecked, and their identities."""

import functools
import math

import pytest
import torch

from megatron_offgrpo.objective import surrogates
from megatron_offgrpo.objective.needs import Needs, needs_of

LN2 = math.log(2.0)
HALF = math.log(0.5)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def value_and_gradient(function, logp, mu, advantage, *more):
    logp = tensor(logp).requires_grad_()
    value = function(logp, tensor(mu), tensor(advantage), *(tensor(one) for one in more))
    (gradient,) = torch.autograd.grad(value.sum(), logp)
    return value.item(), gradient.item()


# rho = 1/2 (logp = ln 1/2, mu = 0), A = 2 where not said otherwise.
CASES = [
    ("linear", surrogates.linear, 2, -1.0, -1.0),
    # rho / (rho + 0.1) = 5/6; d/dlogp = rho * 0.1 / 0.6^2 = 5/36.
    ("shaped", surrogates.shaped, 2, -10 / 6, -10 / 36),
    ("shaped gamma 1/2", functools.partial(surrogates.shaped, gamma=0.5), 2, -1.0, -0.5),
    ("shaped_log", surrogates.shaped_log, 2, 2 * LN2, -2.0),
    ("shaped_log scaled", functools.partial(surrogates.shaped_log, scale=0.5), 2, LN2, -1.0),
    # rho + log rho = 1/2 - ln 2; derivative rho + 1.
    ("shaped_prob_log", surrogates.shaped_prob_log, 2, -1 + 2 * LN2, -3.0),
    ("shaped_prob_log scaled", functools.partial(surrogates.shaped_prob_log, scale=0.5), 2, -1 + LN2, -2.0),
    ("shaped_sqrt", surrogates.shaped_sqrt, 2, -2 * math.sqrt(0.5), -math.sqrt(0.5)),
    # rho^3 = 1/8; derivative 3/8.
    ("shaped_pow", functools.partial(surrogates.shaped_pow, exponent=3.0), 2, -0.25, -0.75),
    ("shaped_pow default is the root", surrogates.shaped_pow, 2, -2 * math.sqrt(0.5), -math.sqrt(0.5)),
    # 0.1 / (1.1 - 0.5) = 1/6; derivative 0.1 * rho / 0.6^2 = 5/36.
    ("shaped_inverse", surrogates.shaped_inverse, 2, -2 / 6, -10 / 36),
    ("clipped, right", surrogates.clipped, 2, -1.0, -1.0),
    # A = -2, rho = 0.5 < 0.8: -(0.8 * -2) = 1.6, flat.
    ("clipped, wrong and improbable", surrogates.clipped, -2, 1.6, 0.0),
    ("clipped, wrong and within range", functools.partial(surrogates.clipped, epsilon=0.6), -2, 1.0, 1.0),
    ("reinforce", surrogates.reinforce, 2, 2 * LN2, -2.0),
    ("sft, right", surrogates.sft, 2, LN2, -1.0),
    ("sft, wrong", surrogates.sft, -2, 0.0, 0.0),
    ("sft, no advantage", surrogates.sft, 0, 0.0, 0.0),
    # sg(1/2) * ln 2; the gradient is that of -pi.
    ("dft, right", surrogates.dft, 2, LN2 / 2, -0.5),
    ("dft, wrong", surrogates.dft, -2, 0.0, 0.0),
]


@pytest.mark.parametrize(
    ("function", "advantage", "value", "gradient"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_values_and_gradients(function, advantage, value, gradient):
    got = value_and_gradient(function, HALF, 0.0, advantage)
    assert got == (pytest.approx(value, rel=1e-14), pytest.approx(gradient, rel=1e-14))


RATIO_CASES = [
    ("linear", surrogates.linear, -4.0),
    ("shaped", surrogates.shaped, -4 / 2.1),
    ("shaped_log", surrogates.shaped_log, -2 * LN2),
    ("shaped_prob_log", surrogates.shaped_prob_log, -4 - 2 * LN2),
    ("shaped_sqrt", surrogates.shaped_sqrt, -2 * math.sqrt(2)),
    ("shaped_pow", functools.partial(surrogates.shaped_pow, exponent=2.0), -8.0),
    ("clipped", surrogates.clipped, -4.0),
    ("reinforce does not use mu", surrogates.reinforce, 2 * LN2),
    ("sft does not use mu", surrogates.sft, LN2),
    ("dft does not use mu", surrogates.dft, LN2 / 2),
]


@pytest.mark.parametrize(("function", "value"), [case[1:] for case in RATIO_CASES], ids=[c[0] for c in RATIO_CASES])
def test_behaviour_log_probs_make_the_ratio(function, value):
    # logp = ln 1/2, mu = ln 1/4: rho = 2, A = 2.
    assert value_and_gradient(function, HALF, 2 * HALF, 2)[0] == pytest.approx(value, rel=1e-14)


def test_shaped_inverse_is_nan_at_and_beyond_its_pole():
    # rho = 2 > 1.1
    value = surrogates.shaped_inverse(tensor(HALF), tensor(2 * HALF), tensor(1.0))
    assert value.isnan().all()


def test_declarations():
    assert needs_of(surrogates.linear) == Needs(unit="token", takes=(), behaviour="optional")
    assert needs_of(lambda logp, mu, advantage: logp) == Needs()
    bound = functools.partial(functools.partial(surrogates.ppo, epsilon_low=0.1), epsilon_high=0.1)
    assert needs_of(bound).behaviour == "required"
    assert needs_of(surrogates.mixed).takes == ("on_policy",)


# (function, ln rho, A, value, derivative); mu = -1, logp = mu + ln rho.
WIDE_PPO = functools.partial(surrogates.ppo, epsilon_low=0.5, epsilon_high=1.0)
RATIOS = [
    # rho = 2 within [1/2, 2]: -2 A.
    ("ppo, inside", WIDE_PPO, LN2, 3.0, -6.0, -6.0),
    # rho = 4 > 2, A > 0: -min(12, 6), flat; A < 0: -min(-12, -6) = 12, not clipped.
    ("ppo, clipped above", WIDE_PPO, 2 * LN2, 3.0, -6.0, 0.0),
    ("ppo, wrong and above", WIDE_PPO, 2 * LN2, -3.0, 12.0, 12.0),
    # rho = 1/4 < 1/2, A < 0: -min(-3/4, -3/2) = 3/2, flat.
    ("ppo, wrong and below", WIDE_PPO, -2 * LN2, -3.0, 1.5, 0.0),
    # The loss of a wrong token is at most c |A| = 9 < 12, flat there; A > 0 is not touched.
    ("dual clip", functools.partial(WIDE_PPO, dual_clip=3.0), 2 * LN2, -3.0, 9.0, 0.0),
    ("dual clip, below its bound", functools.partial(WIDE_PPO, dual_clip=5.0), 2 * LN2, -3.0, 12.0, 12.0),
    ("dual clip, right", functools.partial(WIDE_PPO, dual_clip=3.0), LN2, 3.0, -6.0, -6.0),
    # sg(rho) = 2: -3 * 2 * logp, logp = ln 2 - 1.
    ("cispo", surrogates.cispo, LN2, 3.0, -6 * (LN2 - 1), -6.0),
    ("cispo, bounded", functools.partial(surrogates.cispo, max_ratio=1.5), LN2, 3.0, -4.5 * (LN2 - 1), -4.5),
    ("cispo, wrong", surrogates.cispo, -LN2, -2.0, (-LN2 - 1), 1.0),
    ("redi, right", surrogates.redi, LN2, 3.0, 1 - LN2, -1.0),
    ("redi, wrong", surrogates.redi, LN2, -3.0, 0.8 * (LN2 - 1), 0.8),
    ("redi, no advantage", surrogates.redi, LN2, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(
    ("function", "log_ratio", "advantage", "value", "gradient"),
    [case[1:] for case in RATIOS],
    ids=[c[0] for c in RATIOS],
)
def test_values_and_gradients_against_the_behaviour_policy(function, log_ratio, advantage, value, gradient):
    got = value_and_gradient(function, log_ratio - 1, -1.0, advantage)
    assert got == (pytest.approx(value, rel=1e-14), pytest.approx(gradient, rel=1e-14))


def test_mixed_clips_the_students_own_tokens_and_shapes_the_teachers():
    logp = tensor(LN2, HALF).requires_grad_()
    value = surrogates.mixed(logp, tensor(0.0, 0.0), tensor(2.0, 2.0), on_policy=torch.tensor([True, False]))
    # rho = 2 clipped to 1.2, flat; rho = 1/2: -2 * (1/2) / 0.6, derivative -2 * 0.1 * (1/2) / 0.36.
    assert value.tolist() == pytest.approx([-2.4, -10 / 6], rel=1e-14)
    assert torch.autograd.grad(value.sum(), logp)[0].tolist() == pytest.approx([0.0, -10 / 36], rel=1e-14)


def test_ppo_at_the_behaviour_policy_has_the_gradient_of_reinforce():
    logp, _, advantage = rows()
    at_mu = logp.detach().clone()
    expected = gradient_of(surrogates.reinforce, logp, at_mu, advantage)
    torch.testing.assert_close(gradient_of(surrogates.ppo, logp, at_mu, advantage), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient_of(surrogates.cispo, logp, at_mu, advantage), expected, rtol=1e-14, atol=0)


def test_redi_with_alpha_1_is_reinforce_with_the_signs_of_the_advantages():
    logp, mu, advantage = rows()
    function = functools.partial(surrogates.redi, alpha=1.0)
    expected = surrogates.reinforce(logp, mu, advantage.sign())
    torch.testing.assert_close(function(logp, mu, advantage), expected, rtol=1e-14, atol=0)


TOKEN_SURROGATES = [
    surrogates.linear,
    surrogates.shaped,
    surrogates.shaped_log,
    surrogates.shaped_prob_log,
    surrogates.shaped_sqrt,
    surrogates.shaped_pow,
    surrogates.shaped_inverse,
    surrogates.clipped,
    surrogates.reinforce,
    surrogates.sft,
    surrogates.redi,
    functools.partial(surrogates.ppo, epsilon_low=0.3, epsilon_high=0.3, dual_clip=3.0),
]


def rows(num_rows=12):
    generator = torch.Generator().manual_seed(1)
    logp = -2 * torch.rand(num_rows, generator=generator, dtype=torch.float64) - 0.05
    mu = -0.05 * torch.rand(num_rows, generator=generator, dtype=torch.float64)
    advantage = torch.randn(num_rows, generator=generator, dtype=torch.float64)
    return logp.requires_grad_(), mu, advantage


@pytest.mark.parametrize("function", TOKEN_SURROGATES)
def test_gradcheck(function):
    assert torch.autograd.gradcheck(function, rows())


def gradient_of(function, logp, mu, advantage):
    return torch.autograd.grad(function(logp, mu, advantage).sum(), logp)[0]


def test_linear_gradient_is_minus_advantage_times_ratio():
    logp, mu, advantage = rows()
    expected = -advantage * torch.exp(logp.detach() - mu)
    torch.testing.assert_close(gradient_of(surrogates.linear, logp, mu, advantage), expected, rtol=1e-14, atol=0)


def test_dft_gradient_is_that_of_linear_with_unit_advantage_on_positives():
    logp, mu, advantage = rows()
    expected = gradient_of(surrogates.linear, logp, torch.zeros_like(mu), (advantage > 0).double())
    torch.testing.assert_close(gradient_of(surrogates.dft, logp, mu, advantage), expected, rtol=1e-14, atol=0)


def test_dft_does_not_differentiate_its_weight():
    # The finite difference of dft in logp would be -(1 + logp) pi; its gradient must be -pi.
    assert value_and_gradient(surrogates.dft, -3.0, 0.0, 1.0)[1] == pytest.approx(-math.exp(-3.0), rel=1e-14)


@pytest.mark.parametrize("shape", [(0,), (), (2, 3)])
@pytest.mark.parametrize("function", [*TOKEN_SURROGATES, surrogates.dft, surrogates.cispo])
def test_any_shape_and_dtype(function, shape):
    logp = torch.full(shape, -0.5)
    value = function(logp, torch.zeros(shape), torch.ones(shape))
    assert value.shape == shape
    assert value.dtype == torch.float32
