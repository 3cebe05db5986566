"""Recomputation; and the class of random states that Megatron derives its own from."""

from contextlib import contextmanager

import torch

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager


class CudaRNGStatesTracker: ...


@contextmanager
def activation_recompute_forward(activation_recompute=False, recompute_phase=False):
    yield


def checkpoint(function, *args, **kwargs):
    """Computes `function` again in the backward pass, in fp8 where it was."""
    assert kwargs.keys() == {"distribute_saved_activations", "get_rng_state_tracker", "tp_group"}
    assert not kwargs["distribute_saved_activations"]
    assert not FP8GlobalStateManager.enabled, "the layers have contexts of their own"
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True)
