"""Fingerprint of a model's weights, and how far two models differ."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_conversion.files import bytes_of
from checkpoints_conversion.hf_reader import HfWeights
from megatron_offgrpo.artifacts import fingerprint_of
from megatron_offgrpo.errors import CheckpointError
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
        CheckpointError: the folders do not hold the same tensors.
    """
    a, b = HfWeights(Path(hf_a)), HfWeights(Path(hf_b))
    shapes_a = {name: stored.shape for name, stored in a.tensors.items()}
    shapes_b = {name: stored.shape for name, stored in b.tensors.items()}
    if shapes_a != shapes_b:
        names = sorted(name for name in shapes_a.keys() | shapes_b.keys() if shapes_a.get(name) != shapes_b.get(name))
        raise CheckpointError(
            "the two models do not hold the same tensors", where=f"{hf_a} and {hf_b}", got=", ".join(names[:10])
        )
    changed = total = 0
    with progress("comparing weights (MB)", sum(s.num_bytes for s in a.tensors.values()) / 1e6) as advance:
        for name, stored in a.tensors.items():
            bits_a, bits_b = (w.load(name).to(torch.bfloat16).view(torch.int16) for w in (a, b))
            changed += int((bits_a != bits_b).sum())
            total += bits_a.numel()
            advance(stored.num_bytes / 1e6)
    return changed / max(total, 1)
