"""KL estimates worked out by hand, their gradients, and the clamp."""

import functools
import math

import pytest
import torch

from megatron_offgrpo.objective.divergences import k1, k2, k3

LN2 = math.log(2.0)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def value_and_gradient(function, logp, ref):
    logp = tensor(logp).requires_grad_()
    value = function(logp, tensor(ref))
    value.sum().backward()
    return value.item(), logp.grad.item()


# logp = ln 1/2, ref = ln 1/4: x = ref - logp = -ln 2, exp(x) = 1/2.
@pytest.mark.parametrize(
    ("function", "value", "gradient"),
    [
        (k1, LN2, 1.0),
        (k2, LN2**2 / 2, LN2),
        # expm1(x) - x = -1/2 + ln 2; derivative in logp: 1 - exp(x) = 1/2.
        (k3, LN2 - 0.5, 0.5),
        (functools.partial(k3, clamp=None), LN2 - 0.5, 0.5),
        # With clamp 0.1 the value 0.193 is cut and the gradient vanishes.
        (functools.partial(k3, clamp=0.1), 0.1, 0.0),
    ],
)
def test_values_and_gradients(function, value, gradient):
    got = value_and_gradient(function, math.log(0.5), math.log(0.25))
    assert got == (pytest.approx(value, rel=1e-14), pytest.approx(gradient, rel=1e-14))


def test_k3_is_clamped_at_ten_by_default():
    # x = 3: expm1(3) - 3 = 16.09 -> 10; x = 2: e^2 - 3 = 4.39, gradient 1 - e^2.
    assert value_and_gradient(k3, -4.0, -1.0) == (10.0, 0.0)
    value, gradient = value_and_gradient(k3, -3.0, -1.0)
    assert value == pytest.approx(math.exp(2) - 3, rel=1e-14)
    assert gradient == pytest.approx(1 - math.exp(2), rel=1e-14)
    unclamped = value_and_gradient(functools.partial(k3, clamp=None), -4.0, -1.0)
    assert unclamped == (pytest.approx(math.exp(3) - 4, rel=1e-14), pytest.approx(1 - math.exp(3), rel=1e-14))


@pytest.mark.parametrize("function", [k1, k2, k3])
def test_zero_at_the_reference(function):
    assert function(tensor(-0.7), tensor(-0.7)).item() == 0


@pytest.mark.parametrize("function", [k1, k2, k3])
def test_gradcheck(function):
    generator = torch.Generator().manual_seed(0)
    logp = -torch.rand(7, generator=generator, dtype=torch.float64)
    ref = -torch.rand(7, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(function, (logp.requires_grad_(), ref))


@pytest.mark.parametrize("function", [k1, functools.partial(k3, clamp=None)])
def test_unbiased_over_the_policys_own_tokens(function):
    # pi = (1/2, 1/4, 1/4), ref = (1/4, 1/4, 1/2): KL = 1/2 ln 2 + 0 - 1/4 ln 2 = 1/4 ln 2.
    pi, ref = tensor(0.5, 0.25, 0.25), tensor(0.25, 0.25, 0.5)
    assert (pi * function(pi.log(), ref.log())).sum().item() == pytest.approx(LN2 / 4, rel=1e-14)
