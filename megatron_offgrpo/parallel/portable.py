"""Lets Megatron-Core run where there is no GPU: the same schedules, layers and optimizer, over gloo on the CPU.

Megatron-Core asks for "cuda" by name in many places. `install()` answers those requests with the CPU for the
life of the process, and does nothing where a GPU is found. Nothing here changes what is computed.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_installed: TorchFunctionMode | None = None


def needed() -> bool:
    """True where torch finds no CUDA device."""
    return not torch.cuda.is_available()


def install() -> None:
    """Redirects Megatron's CUDA requests to the CPU, once per process; without effect on a GPU machine."""
    global _installed
    if _installed is not None or not needed():
        return
    _replace_cuda_functions()
    _replace_megatron_functions()
    _installed = _CudaMeansCpu()
    _installed.__enter__()


def _is_cuda(device: Any) -> bool:
    if device is None:
        return False
    # An int is a CUDA ordinal.
    return isinstance(device, int) or torch.device(device).type == "cuda"


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites `device="cuda"`, `.to("cuda")`, `.cuda()`, pinning, and the type names that clip_grads asserts."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if kwargs:
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs = {**kwargs, "device": "cpu"}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], str | torch.device) and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.")
        return result


class _Stream:
    """Work on the CPU is already ordered; every wait is over before it starts."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *_: Any) -> "_Event":
        return _Event()


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _stream(*_: Any, **__: Any) -> _Stream:
    return _Stream()


def _replace_cuda_functions() -> None:
    replacements: dict[str, Callable[..., Any]] = {
        "current_device": lambda: torch.device("cpu"),
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "current_stream": _stream,
        "default_stream": _stream,
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda _: contextlib.nullcontext(),
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.manual_seed(seed),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.cuda.nvtx.range_push = _nothing
    torch.cuda.nvtx.range_pop = _nothing


def _replace_megatron_functions() -> None:
    import megatron.core.tensor_parallel.random as megatron_random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()

    # Megatron's version does nothing to a CPU tensor, also where NumPy split sizes were asked for.
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _load_megatron() -> None:
    """Imports Megatron without torch's compiler, which its decorators load: 2 of 5 seconds of a process's start.

    What they decorate are fused functions, which this project has off on a CPU. So each module that imports Megatron
    imports this one first.
    """
    compiler = torch.compile

    def leave_as_it_is(function: Any = None, **_: Any) -> Any:
        return (lambda decorated: decorated) if function is None else function

    torch.compile = leave_as_it_is
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = compiler


if needed():
    _load_megatron()
