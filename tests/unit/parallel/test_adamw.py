"""AdamW with its step in the group equals torch's, and its state survives a round trip."""

import copy

import torch

from megatron_offgrpo.parallel.adamw import GroupStepAdamW


def _parameters():
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (5, 8)]


def _groups(parameters):
    return [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0}]


def _step(optimizer, parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_equals_torch_adamw():
    ours, theirs = _parameters(), _parameters()
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-6}
    a = GroupStepAdamW(_groups(ours), **settings)
    b = torch.optim.AdamW(_groups(theirs), fused=True, **settings)
    for seed in range(5):
        _step(a, ours, seed)
        _step(b, theirs, seed)
        for x, y in zip(ours, theirs, strict=True):
            assert torch.equal(x, y)
    assert [group["step"] for group in a.param_groups] == [5, 5]
    assert set(a.state[ours[0]]) == {"exp_avg", "exp_avg_sq"}


def test_first_step_by_hand():
    # m/(1-b1) = g, v/(1-b2) = g^2: p = 1 - lr*wd*1 - lr * g/(|g|+eps) = 1 - 0.001 - 0.1
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    parameter.grad = torch.tensor([4.0])
    GroupStepAdamW([parameter], lr=0.1, weight_decay=0.01, eps=0.0).step()
    assert torch.allclose(parameter, torch.tensor([0.899]))


def test_state_dict_round_trip_continues_identically():
    a, b = _parameters(), _parameters()
    first = GroupStepAdamW(_groups(a), lr=0.01)
    _step(first, a, 0)
    second = GroupStepAdamW(_groups(b), lr=0.01)
    with torch.no_grad():
        for x, y in zip(b, a, strict=True):
            x.copy_(y)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    _step(first, a, 1)
    _step(second, b, 1)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
