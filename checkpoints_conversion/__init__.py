"""Converts models between Hugging Face and Megatron; usable without the rest of the project."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from checkpoints_conversion.apply import hf_to_megatron, megatron_to_hf
    from checkpoints_conversion.fingerprints import changed_weights
    from checkpoints_conversion.planning import plan
    from checkpoints_conversion.verification import verify

__all__ = ["changed_weights", "hf_to_megatron", "megatron_to_hf", "plan", "verify"]
_MODULES = {
    "changed_weights": "fingerprints",
    "hf_to_megatron": "apply",
    "megatron_to_hf": "apply",
    "plan": "planning",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    """Imports a function when it is asked for: the command line's help needs no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
