"""Whether linear layers compute in fp8, and the rounding."""

from contextlib import contextmanager

import torch
from torch import Tensor

from transformer_engine.common.recipe import Float8CurrentScaling, Format


class FP8GlobalStateManager:
    enabled = False

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.enabled


@contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
    assert not calibrating
    assert not enabled or (type(fp8_recipe) is Float8CurrentScaling and fp8_recipe.fp8_format is Format.HYBRID)
    before, FP8GlobalStateManager.enabled = FP8GlobalStateManager.enabled, enabled
    try:
        yield
    finally:
        FP8GlobalStateManager.enabled = before


@contextmanager
def fp8_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=False):
    assert not enabled, "weights are kept in bf16"
    yield


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To fp8 and back to fp32, the largest value at the end of the format's range."""
    end = torch.finfo(dtype).max
    largest = float(x.abs().max()) if x.numel() else 0.0
    scale = end / largest if largest else 1.0
    return (x.float() * scale).clamp(-end, end).to(dtype).float() / scale


class Fp8Product(torch.autograd.Function):
    """x w^T of values in e4m3; gradients that come back are in e5m2. Products are summed in fp32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, weight_fp8: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        # cuBLAS takes no others: the three products of a linear layer have each side innermost once.
        assert not any(side % 16 for side in (rows, *weight.shape)), (x.shape, weight.shape)
        x_fp8 = rounded(x, torch.float8_e4m3fn)
        ctx.save_for_backward(x_fp8, weight_fp8)
        ctx.dtype = x.dtype
        return (x_fp8 @ weight_fp8.T).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x_fp8, weight_fp8 = ctx.saved_tensors
        gradient = rounded(gradient, torch.float8_e5m2)
        of_weight = gradient.flatten(0, -2).T @ x_fp8.flatten(0, -2)
        return (gradient @ weight_fp8).to(ctx.dtype), of_weight.to(ctx.dtype), None
