"""Continual post-training of reasoning LLMs by offline GRPO on Megatron-Core."""

__version__ = "0.1.0"
