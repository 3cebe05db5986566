"""Packing compared with first-fit decreasing and the lower bound, and the time to plan a million sequences.

    python -m tools.bench_packing [--data FOLDER] [--sequences 1000000]

FOLDER holds trajectories/*.jsonl.gz. A response's length is `n_tokens` where the file has it, else characters / 4; a
prompt's is characters / 4. Sequences longer than a pack are cut to its length, as `offgrpo prepare` would.
"""

import argparse
import gzip
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_offgrpo.artifacts import Manifest
from megatron_offgrpo.config import ObjectiveConfig, PlanConfig
from megatron_offgrpo.objective import advantages
from megatron_offgrpo.planning.packing import lower_bound, pack
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.types import BoolArray, FloatArray, IntArray

GROUPS_PER_STEP = 32
PACK_MULTIPLE = 64


def first_fit_decreasing(lengths: IntArray, max_tokens: int) -> list[list[int]]:
    """Longest first, each to the first pack with room (Johnson 1973)."""
    packs: list[list[int]] = []
    room = np.zeros(len(lengths), dtype=np.int64)
    for item in np.argsort(-lengths, kind="stable").tolist():
        fitting = np.flatnonzero(room[: len(packs)] >= lengths[item])
        if len(fitting) == 0:
            room[len(packs)] = max_tokens
            packs.append([])
            fitting = np.array([len(packs) - 1])
        packs[fitting[0]].append(item)
        room[fitting[0]] -= lengths[item]
    return packs


@dataclass(frozen=True)
class Lengths:
    """Tokens of each sequence of a file, and where the groups begin."""

    tokens: IntArray
    offsets: IntArray
    share_counted: float
    """Share of the responses whose length is a token count and no estimate."""


def read_lengths(file: Path) -> Lengths:
    tokens, sizes, counted = [], [], 0
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            group = json.loads(line)
            sizes.append(len(group["solutions"]))
            for solution in group["solutions"]:
                known = solution.get("n_tokens")
                counted += known is not None
                response = known if known is not None else len(solution["text"]) // 4
                tokens.append(len(group["problem"]) // 4 + response)
    return Lengths(
        np.array(tokens, dtype=np.int64), np.concatenate([[0], np.cumsum(sizes)]), counted / max(1, len(tokens))
    )


def tokens_computed(lengths: IntArray, packs: list[list[int]], *, one_length: bool) -> int:
    """Tokens of all packs, each rounded up to PACK_MULTIPLE; `one_length`: all as long as the step's longest."""
    sizes = np.array([lengths[members].sum() for members in packs])
    padded = -(-sizes // PACK_MULTIPLE) * PACK_MULTIPLE
    return int(padded.max() * len(padded) if one_length else padded.sum())


def compare(file: Path, max_tokens: int) -> str:
    """One row of the table, over all steps of a file."""
    data = read_lengths(file)
    cut = int((data.tokens > max_tokens).sum())
    lengths = np.minimum(data.tokens, max_tokens)
    bound = 0
    packs = {"pack": 0, "ffd": 0}
    own = {"pack": 0, "ffd": 0}
    one = {"pack": 0, "ffd": 0}
    for start in range(0, len(data.offsets) - 1, GROUPS_PER_STEP):
        end = min(start + GROUPS_PER_STEP, len(data.offsets) - 1)
        step = lengths[data.offsets[start] : data.offsets[end]]
        bound += lower_bound(step, max_tokens)
        for name, result in (("pack", pack(step, max_tokens)), ("ffd", first_fit_decreasing(step, max_tokens))):
            packs[name] += len(result)
            own[name] += tokens_computed(step, result, one_length=False)
            one[name] += tokens_computed(step, result, one_length=True)
    total = int(lengths.sum())
    fills = "".join(f" {100 * total / computed[name]:8.2f}" for computed in (own, one) for name in packs)
    name = file.name.removesuffix(".jsonl.gz")
    return (
        f"{name:14} {len(lengths):6} {100 * data.share_counted:6.0f} {cut:5} {max_tokens:7}"
        f" {bound:6} {packs['pack']:6} {packs['ffd']:6}{fills}"
    )


@dataclass(frozen=True)
class SyntheticStore:
    """Groups of eight trajectories with log-normal response lengths, without tokens."""

    num_groups: int
    prompt_lengths: IntArray
    response_lengths: IntArray
    rewards: FloatArray
    manifest: Manifest = field(default_factory=lambda: Manifest("store", "synthetic"))

    @property
    def num_trajectories(self) -> int:
        return 8 * self.num_groups

    @property
    def group_offsets(self) -> IntArray:
        return 8 * np.arange(self.num_groups + 1, dtype=np.int64)

    @property
    def on_policy(self) -> BoolArray:
        return np.zeros(self.num_trajectories, dtype=np.bool_)

    @property
    def truncated(self) -> BoolArray:
        return np.zeros(self.num_trajectories, dtype=np.bool_)


def synthetic_store(num_sequences: int) -> SyntheticStore:
    """Median 4,900 tokens, cut at 31,744, prompts of 50 to 499 tokens: the size of the released recipe's data."""
    generator = np.random.default_rng(0)
    groups = num_sequences // 8
    return SyntheticStore(
        num_groups=groups,
        prompt_lengths=np.repeat(generator.integers(50, 500, groups), 8),
        response_lengths=np.minimum(31744, generator.lognormal(8.5, 0.9, 8 * groups)).astype(np.int64),
        rewards=(generator.random(8 * groups) < 0.6).astype(np.float64),
    )


def never_called(*_: object) -> None:
    raise AssertionError("planning computes no surrogate and no divergence")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--sequences", type=int, default=1_000_000)
    arguments = parser.parse_args()
    files = sorted((arguments.data / "trajectories").glob("*.jsonl.gz"))
    if files:
        print(f"steps of {GROUPS_PER_STEP} groups; fill in % of the tokens computed, packs padded to {PACK_MULTIPLE}:")
        print("each pack at its own length (own), and all packs of a step as long as its longest (one)")
        print("file              seqs count%   cut     max  bound   pack    FFD  own:pack  own:FFD one:pack  one:FFD")
        for max_tokens in (8192, 32768):
            for file in files:
                print(compare(file, max_tokens))
    else:
        print(f"no trajectories/*.jsonl.gz in {arguments.data}: only the synthetic run")
    objective = ObjectiveConfig(advantage=advantages.mean_only, surrogate=never_called, kl=never_called)
    store = synthetic_store(arguments.sequences)
    start, start_cpu = time.perf_counter(), time.process_time()
    plan = build_plan(store, PlanConfig(groups_per_step=GROUPS_PER_STEP), objective)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    counts = plan.manifest.counts
    fill = 100 * counts["tokens"] / counts["padded_tokens"]
    print(
        f"{counts['trajectories']:,} synthetic sequences planned in {seconds:.1f} s ({cpu_seconds:.1f} s of one core):"
    )
    print(f"{plan.num_steps} steps, {plan.num_packs} packs, fill {fill:.3f} %")


if __name__ == "__main__":
    main()
