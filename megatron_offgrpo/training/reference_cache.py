"""REFERENCE: log-probs of the reference model for every response token of a store, on disk.

It depends on the store, the weights, the tokenizer and the precision alone and is indexed by trajectory, so another
plan, seed, pack length, layout or objective reads the same cache.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_offgrpo.artifacts import Manifest, atomic_folder, fingerprint_of, read_manifest, require_input
from megatron_offgrpo.artifacts import write_manifest as write_artifact_manifest
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.errors import DataError
from megatron_offgrpo.model.hf_config import Architecture
from megatron_offgrpo.types import IntArray

LOGPROBS_FILE = "logprobs.npy"


@dataclass(frozen=True)
class ReferenceCache:
    """Reference log-probs, memory-mapped."""

    manifest: Manifest
    offsets: IntArray
    """[trajectories + 1] offsets into `logprobs`."""
    logprobs: npt.NDArray[np.float32]
    """[response tokens of the store] natural logs, trajectories in store order."""

    def lookup(self, trajectory: int) -> npt.NDArray[np.float32]:
        """The log-probs of one trajectory, one per response token."""
        return self.logprobs[self.offsets[trajectory] : self.offsets[trajectory + 1]]


def inputs_of(
    store: TrajectoryStore, weights_fingerprint: str, precision: str, architecture: Architecture
) -> dict[str, str]:
    """What a cache depends on, by name."""
    return {
        "store": store.manifest.fingerprint,
        "tokenizer": store.manifest.inputs["tokenizer"],
        "weights": weights_fingerprint,
        # Equal weights are another model with another rotary base or norm epsilon.
        "architecture": fingerprint_of(asdict(architecture)),
        "precision": precision,
    }


def open_reference(path: str | Path, store: TrajectoryStore, inputs: dict[str, str], *, remedy: str) -> ReferenceCache:
    """The cache in `path`, after its inputs were found to be these.

    Args:
        remedy: the command that makes it.

    Raises:
        DataError: no cache, one made from other weights, tokenizer, store or precision, or a truncated file.
    """
    folder = Path(path)
    manifest = read_manifest(folder, "reference", remedy=remedy)
    for name, fingerprint in inputs.items():
        require_input(manifest, name, fingerprint, where=folder, other="in use", remedy=remedy)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(store.response_lengths)])
    file = folder / LOGPROBS_FILE
    try:
        logprobs = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as cause:
        raise DataError(f"unreadable reference ({cause})", where=str(file), remedy=remedy) from None
    if logprobs.shape != (offsets[-1],):
        raise DataError(
            "truncated reference",
            where=str(file),
            expected=f"{offsets[-1]} log-probs",
            got=logprobs.shape,
            remedy=remedy,
        )
    return ReferenceCache(manifest, offsets, logprobs)


def write_reference(path: str | Path, logprobs: npt.NDArray[np.float32], inputs: dict[str, str], config: dict) -> None:
    """Writes a complete cache.

    Raises:
        DataError: a log-prob is NaN or inf.
    """
    bad = np.flatnonzero(~np.isfinite(logprobs))
    if len(bad):
        raise DataError(
            f"{len(bad)} reference log-probs are NaN or inf",
            where=str(path),
            expected="finite log-probs",
            got=f"token {bad[0]}: {logprobs[bad[0]]}",
            remedy="check the checkpoint and the precision (model.precision)",
        )
    with atomic_folder(Path(path)) as folder:
        np.save(folder / LOGPROBS_FILE, logprobs.astype(np.float32))
        counts = {"tokens": len(logprobs), "mean_logp": float(logprobs.mean()) if len(logprobs) else 0.0}
        write_artifact_manifest(
            folder,
            Manifest(
                kind="reference",
                fingerprint=fingerprint_of(inputs, logprobs.astype(np.float32).tobytes()),
                inputs=inputs,
                counts=counts,
                config=config,
            ),
        )
