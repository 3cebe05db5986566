"""Converts models between Hugging Face and Megatron; usable without the rest of the project."""

from checkpoints_conversion.apply import hf_to_megatron, megatron_to_hf
from checkpoints_conversion.fingerprints import changed_weights
from checkpoints_conversion.planning import plan
from checkpoints_conversion.verification import verify

__all__ = ["changed_weights", "hf_to_megatron", "megatron_to_hf", "plan", "verify"]
