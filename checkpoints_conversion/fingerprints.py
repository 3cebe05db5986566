"""Fingerprint of a model's weights, and how far two models differ."""

import hashlib
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_conversion.files import bytes_of
from checkpoints_conversion.planning import plan
from megatron_offgrpo.artifacts import fingerprint_of
from megatron_offgrpo.errors import CheckpointError
from megatron_offgrpo.model.hf_config import architecture_differences
from megatron_offgrpo.progress import progress


class WeightsFingerprint:
    """SHA-256 over the sorted Hugging Face names with dtype, shape and SHA-256 of the bytes of each tensor.

    It depends on the weights alone: not on shards, file order, Megatron's layout or the order in which tensors come.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, tuple[str, list[int], hashlib._Hash]] = {}

    def add(self, name: str, rows: Tensor, shape: tuple[int, ...] | None = None) -> None:
        """Takes in a tensor, or the next rows of one whose `shape` is given."""
        if name not in self._tensors:
            self._tensors[name] = (str(rows.dtype), list(rows.shape if shape is None else shape), hashlib.sha256())
        self._tensors[name][2].update(bytes_of(rows))

    def result(self) -> str:
        """32 hex digits."""
        return fingerprint_of(
            sorted((n, dtype, shape, h.hexdigest()) for n, (dtype, shape, h) in self._tensors.items())
        )


def changed_weights(hf_a: Path, hf_b: Path) -> float:
    """Share of the weights whose bf16 bits differ between two Hugging Face folders, read one tensor at a time.

    Raises:
        CheckpointError | ConfigError: the folders hold no models, or models of two architectures.
    """
    a, b = (plan(Path(folder), one_dtype=True) for folder in (hf_a, hf_b))
    differing = architecture_differences(a.layout.architecture, asdict(b.layout.architecture))
    if differing:
        raise CheckpointError(
            "the two models have different architectures:\n  " + "\n  ".join(differing) + "\n",
            where=f"{hf_a} and {hf_b}",
        )
    changed = total = 0
    with progress("comparing weights (MB)", a.total_bytes / 1e6) as advance:
        for name in a.layout.hf_shapes():
            bits_a, bits_b = (w.source.load(name).to(torch.bfloat16).view(torch.int16) for w in (a, b))
            changed += int((bits_a != bits_b).sum())
            total += bits_a.numel()
            advance(a.source.tensors[name].num_bytes / 1e6)
    return changed / max(total, 1)
