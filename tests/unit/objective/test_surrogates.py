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


RATIOS_TO_CLIP = (0.2, 0.5, 0.75, 0.9, 1.1, 1.2, 1.35, 2.0, 2.9, 3.5, 5.0)


def rows_to_clip():
    """Right, then wrong rows of each ratio above, none of them at the bounds 0.8, 1.28 and 3 used below."""
    log_ratio = tensor(*RATIOS_TO_CLIP, *RATIOS_TO_CLIP).log()
    mu = torch.linspace(-4, -2, len(log_ratio), dtype=torch.float64)
    advantage = tensor(*[1.5] * len(RATIOS_TO_CLIP), *[-0.7] * len(RATIOS_TO_CLIP))
    return (mu + log_ratio).requires_grad_(), mu, advantage


def ppo_by_branch(logp, mu, advantage, dual_clip=math.inf):
    """Value and derivative of clip(rho, 0.8, 1.28), branch by branch; each branch has rows."""
    ratio = torch.exp(logp.detach() - mu)
    right, wrong = advantage > 0, advantage < 0
    value, gradient = -advantage * ratio, -advantage * ratio
    branches = [(right & (ratio > 1.28), 1.28), (wrong & (ratio < 0.8), 0.8), (wrong & (ratio > dual_clip), dual_clip)]
    for rows_clipped, bound in branches if dual_clip < math.inf else branches[:2]:
        assert rows_clipped.any()
        value[rows_clipped] = -bound * advantage[rows_clipped]
        gradient[rows_clipped] = 0
    # Right and below the range, wrong and above it, and both inside: not clipped.
    for rows_kept in (right & (ratio < 0.8), wrong & (ratio > 1.28), right & (ratio > 1), wrong & (ratio < 1)):
        assert (gradient[rows_kept] != 0).any()
    return value, gradient


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_gradcheck_of_ppo_on_every_branch(dual_clip):
    function = functools.partial(surrogates.ppo, epsilon_low=0.2, epsilon_high=0.28, dual_clip=dual_clip)
    arguments = rows_to_clip()
    value, gradient = ppo_by_branch(*arguments, dual_clip=dual_clip or math.inf)
    torch.testing.assert_close(function(*arguments).detach(), value, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient_of(function, *arguments), gradient, rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(function, arguments, atol=1e-7, rtol=1e-6)


def test_gradcheck_of_mixed_on_every_branch_of_both_policies():
    logp, mu, advantage = (torch.cat([vector, vector]).detach() for vector in rows_to_clip())
    logp.requires_grad_()
    half = len(mu) // 2
    on_policy = torch.arange(len(mu)) < half
    function = functools.partial(surrogates.mixed, on_policy=on_policy, epsilon_high=0.28)
    value, gradient = ppo_by_branch(logp[:half], mu[:half], advantage[:half])
    ratio = torch.exp(logp.detach() - mu)[half:]
    value = torch.cat([value, -advantage[half:] * ratio / (ratio + 0.1)])
    gradient = torch.cat([gradient, -advantage[half:] * 0.1 * ratio / (ratio + 0.1) ** 2])
    torch.testing.assert_close(function(logp, mu, advantage).detach(), value, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient_of(function, logp, mu, advantage), gradient, rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(function, (logp, mu, advantage), atol=1e-7, rtol=1e-6)


# (function, factor(logp, mu, A)): the loss is -factor * logp, and the factor is not differentiated.
STOPPED_FACTORS = [
    (surrogates.cispo, lambda logp, mu, advantage: advantage * min(math.exp(logp - mu), 5.0)),
    (
        functools.partial(surrogates.cispo, max_ratio=1.28),
        lambda logp, mu, advantage: advantage * min(math.exp(logp - mu), 1.28),
    ),
    (surrogates.dft, lambda logp, mu, advantage: math.exp(logp) if advantage > 0 else 0.0),
]


@pytest.mark.parametrize(("function", "factor"), STOPPED_FACTORS, ids=["cispo", "cispo bounded", "dft"])
def test_gradcheck_with_the_stopped_factor_held_constant(function, factor):
    arguments = rows_to_clip()
    constant = tensor(*map(factor, *(vector.tolist() for vector in arguments)))

    def held(logp, mu, advantage):
        return -constant * logp

    assert torch.autograd.gradcheck(held, arguments, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(function(*arguments), held(*arguments), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient_of(function, *arguments), gradient_of(held, *arguments), rtol=1e-13, atol=0)


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
@pytest.mark.parametrize("function", [*TOKEN_SURROGATES, surrogates.dft, surrogates.ppo, surrogates.cispo])
def test_any_shape_and_dtype(function, shape):
    logp = torch.full(shape, -0.5)
    value = function(logp, torch.zeros(shape), torch.ones(shape))
    assert value.shape == shape
    assert value.dtype == torch.float32
