"""Do trainer, Hugging Face and vLLM compute the same model? Log-probs of the same trajectories, side by side.

The trainer's are those of the reference cache, made with the checkpoint the run starts from; the others are computed
from the Hugging Face folder. A wrong conversion, another tokenizer or another base model shows as a large difference.
"""

from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_offgrpo.artifacts import write_json_atomically
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.data.vocabulary import require_known_ids, vocabulary_of
from megatron_offgrpo.errors import CheckpointError, ConfigError
from megatron_offgrpo.evaluation.generation import BackendConfig, open_backend
from megatron_offgrpo.evaluation.task import model_fingerprint
from megatron_offgrpo.progress import progress
from megatron_offgrpo.training.reference_cache import open_reference

TRAINER = "trainer"
LARGEST_MEAN = {"fp32": 1e-3, "bf16": 0.1}
"""Mean absolute difference up to which two computations count as the same model, in nats. fp32 differs by its rounding
(about 1e-6), bf16 by noise of a few hundredths."""
BATCH = 16

Values = list[npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Agreement:
    """Two computations of the same log-probs."""

    first: str
    second: str
    max_abs: float
    """Largest absolute difference, in nats."""
    mean_abs: float
    worst_trajectory: int
    """Number, in the store, of the trajectory with the largest difference."""


def check_weights(
    store_dir: Path, reference_dir: Path, model: Path, backends: list[BackendConfig], trajectories: int, output: Path
) -> dict[str, Any]:
    """Compares the log-probs of trajectories spread evenly over the store; writes and returns the result.

    Raises:
        ConfigError, DataError: an input is missing, or the reference belongs to another store.
        CheckpointError: two computations differ by more than their precision explains; OUTPUT is written first.
    """
    if trajectories < 1 or not backends:
        raise ConfigError("nothing to compare", where="check-weights", expected="a back end and a trajectory or more")
    store = TrajectoryStore.open(store_dir)
    require_known_ids(store.largest_id, vocabulary_of(model), model, where=str(store_dir))
    reference = open_reference(
        reference_dir, store, {"store": store.manifest.fingerprint}, remedy="offgrpo reference RECIPE"
    )
    number = min(trajectories, store.num_trajectories)
    chosen = np.unique(np.linspace(0, store.num_trajectories - 1, number).astype(np.int64)).tolist()
    cached = [reference.lookup(index) for index in chosen]
    values: dict[str, Values] = {TRAINER: [np.asarray(one, dtype=np.float64) for one in cached]}
    precisions = {reference.manifest.inputs["precision"]}
    for config in backends:
        values[config.backend] = _scored(config, store, chosen)
        precisions.add(config.precision)
    pairs = [_agreement(first, second, values, chosen) for first, second in combinations(values, 2)]
    limit = LARGEST_MEAN["fp32" if precisions == {"fp32"} else "bf16"]
    result = {
        "agree": all(pair.mean_abs <= limit for pair in pairs),
        "largest_mean_allowed": limit,
        "trajectories": len(chosen),
        "tokens": int(sum(len(one) for one in values[TRAINER])),
        "precisions": sorted(precisions),
        "pairs": [asdict(pair) for pair in pairs],
        "inputs": {"model": model_fingerprint(model), "reference": reference.manifest.fingerprint},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(output, result)
    if not result["agree"]:
        worst = max(pairs, key=lambda pair: pair.mean_abs)
        raise CheckpointError(
            f"{worst.first} and {worst.second} do not compute the same model",
            where=str(model),
            expected=f"a mean difference of at most {limit:g} nats a token",
            got=f"{worst.mean_abs:.4g} (largest {worst.max_abs:.4g}, in trajectory {worst.worst_trajectory})",
            remedy="check that the reference was made from this model's conversion, and convert again",
        )
    return result


def _scored(config: BackendConfig, store: TrajectoryStore, chosen: list[int]) -> Values:
    """Log-probs of the response tokens under one back end."""
    found: Values = []
    with open_backend(config) as backend, progress(f"scoring with {config.backend}", len(chosen)) as advance:
        for start in range(0, len(chosen), BATCH):
            batch = [store.trajectory(index) for index in chosen[start : start + BATCH]]
            sequences = [[*one.prompt_ids.tolist(), *one.response_ids.tolist()] for one in batch]
            for one, logprobs in zip(batch, backend.logprobs(sequences), strict=True):
                found.append(np.asarray(logprobs[len(logprobs) - len(one.response_ids) :], dtype=np.float64))
            advance(len(batch))
    return found


def _agreement(first: str, second: str, values: dict[str, Values], chosen: list[int]) -> Agreement:
    gaps = [np.abs(one - other) for one, other in zip(values[first], values[second], strict=True)]
    largest = [float(gap.max(initial=0.0)) for gap in gaps]
    everything = np.concatenate(gaps)
    return Agreement(first, second, max(largest), float(everything.mean()), chosen[int(np.argmax(largest))])
