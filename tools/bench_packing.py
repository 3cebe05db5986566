"""Packing compared with that of other trainers and the lower bound; plans with and without shared prompts; and the time
to plan a million sequences.

    python -m tools.bench_packing [--data FOLDER] [--sequences 1000000]

FOLDER holds trajectories/*.jsonl.gz. A response's length is `n_tokens` where the file has it, else characters / 4; a
prompt's is characters / 4. Sequences longer than a pack are cut to its length, as `offgrpo prepare` would.
"""

import argparse
import gzip
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_offgrpo.artifacts import Manifest
from megatron_offgrpo.config import LayoutConfig, ObjectiveConfig, PlanConfig
from megatron_offgrpo.objective import advantages
from megatron_offgrpo.planning.assignment import assign, imbalance
from megatron_offgrpo.planning.estimate import ENOUGH_PACKS, balance
from megatron_offgrpo.planning.packing import lower_bound, pack
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.planning.shape import ModelShape
from megatron_offgrpo.types import BoolArray, FloatArray, IntArray
from tools.packing_baselines import first_fit_decreasing, karmarkar_karp, modified_first_fit_decreasing

GROUPS_PER_STEP = 32
PACK_MULTIPLE = 64
EQUAL_PARTS = 16
DATA_PARALLEL = (2, 3, 4, 6, 8, 12, 16)
SHAPE = ModelShape(28, 3584, 18944, 28, 4, 128, 152064, qkv_bias=True)
"""Qwen2.5-7B's sizes."""
PACKINGS: dict[str, Callable[[IntArray, int], list[list[int]]]] = {
    "fewest": pack,
    "equal parts": partial(pack, equal_parts=EQUAL_PARTS),
    "FFD": first_fit_decreasing,
    "KK (verl)": karmarkar_karp,
    "MFFD (NeMo)": modified_first_fit_decreasing,
}
"""`fewest` and `equal parts` are this project's."""
RULES: tuple[Literal["never"], Literal["always"]] = ("never", "always")


@dataclass(frozen=True)
class Lengths:
    """Tokens of each sequence of a file, and where the groups begin."""

    tokens: IntArray
    offsets: IntArray
    share_counted: float
    """Share of the responses whose length is a token count and no estimate."""


@dataclass(frozen=True)
class Group:
    """Lengths and labels of a problem's solutions."""

    prompt: int
    responses: IntArray
    labels: list[int]
    num_counted: int
    """Responses whose length is a token count and no estimate."""


def read_groups(file: Path) -> list[Group]:
    groups = []
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            group = json.loads(line)
            solutions = group["solutions"]
            known = [solution.get("n_tokens") for solution in solutions]
            lengths = [len(s["text"]) // 4 if n is None else n for s, n in zip(solutions, known, strict=True)]
            labels = [solution["label"] for solution in solutions]
            counted = sum(n is not None for n in known)
            groups.append(Group(len(group["problem"]) // 4, np.array(lengths, dtype=np.int64), labels, counted))
    return groups


def read_lengths(file: Path) -> Lengths:
    groups = read_groups(file)
    tokens = np.concatenate([group.prompt + group.responses for group in groups])
    offsets = np.concatenate([[0], np.cumsum([len(group.responses) for group in groups])])
    return Lengths(tokens, offsets, sum(group.num_counted for group in groups) / max(1, len(tokens)))


def tokens_computed(lengths: IntArray, packs: list[list[int]], *, one_length: bool) -> int:
    """Tokens of all packs, each rounded up to PACK_MULTIPLE; `one_length`: all as long as the step's longest."""
    sizes = np.array([lengths[members].sum() for members in packs])
    padded = -(-sizes // PACK_MULTIPLE) * PACK_MULTIPLE
    return int(padded.max() * len(padded) if one_length else padded.sum())


def flops_of(lengths: IntArray, packs: list[list[int]]) -> FloatArray:
    """FLOPs of each pack on a 7B model, attention included; nine tenths of the tokens are responses."""
    sizes = np.array([lengths[members].sum() for members in packs], dtype=np.float64)
    squares = np.array([(lengths[members].astype(np.float64) ** 2).sum() for members in packs])
    padded = -(-sizes // PACK_MULTIPLE) * PACK_MULTIPLE
    per_token = 6.0 * SHAPE.matmul_parameters_per_token
    attention = 6.0 * SHAPE.num_layers * SHAPE.query_size * squares
    return per_token * padded + attention + 8.0 * SHAPE.embedding * 0.9 * sizes


class Tally:
    """What one packing does over the steps of a file."""

    def __init__(self) -> None:
        self.packs = self.own = self.one = 0
        self.worst = dict.fromkeys(DATA_PARALLEL, 0.0)
        self.steps = dict.fromkeys(DATA_PARALLEL, 0)

    def add(self, lengths: IntArray, packs: list[list[int]]) -> None:
        self.packs += len(packs)
        self.own += tokens_computed(lengths, packs, one_length=False)
        self.one += tokens_computed(lengths, packs, one_length=True)
        costs = flops_of(lengths, packs)
        for dp in DATA_PARALLEL:
            if len(packs) >= ENOUGH_PACKS * dp:
                self.steps[dp] += 1
                self.worst[dp] = max(self.worst[dp], imbalance(costs, assign(costs, dp)))


def compare(file: Path, max_tokens: int) -> list[str]:
    """A row for each packing, over all steps of a file."""
    data = read_lengths(file)
    cut = int((data.tokens > max_tokens).sum())
    lengths = np.minimum(data.tokens, max_tokens)
    bound = 0
    tallies = {name: Tally() for name in PACKINGS}
    for start in range(0, len(data.offsets) - 1, GROUPS_PER_STEP):
        end = min(start + GROUPS_PER_STEP, len(data.offsets) - 1)
        step = lengths[data.offsets[start] : data.offsets[end]]
        bound += lower_bound(step, max_tokens)
        for name, tally in tallies.items():
            tally.add(step, PACKINGS[name](step, max_tokens))
    total = int(lengths.sum())
    name = file.name.removesuffix(".jsonl.gz")
    rows = [f"{name}: {len(lengths)} sequences, {cut} cut to {max_tokens}, lower bound {bound} packs"]
    for name, tally in tallies.items():
        balance = "".join(
            f" {100 * tally.worst[dp]:7.2f} ({tally.steps[dp]:2})" if tally.steps[dp] else " " * 13
            for dp in DATA_PARALLEL
        )
        rows.append(
            f"  {name:12} {tally.packs:6} {100 * total / tally.own:8.2f} {100 * total / tally.one:8.2f}{balance}"
        )
    return rows


@dataclass(frozen=True)
class LengthStore:
    """What a plan reads of a store: lengths and rewards, no tokens."""

    group_offsets: IntArray
    prompt_lengths: IntArray
    response_lengths: IntArray
    rewards: FloatArray
    manifest: Manifest = field(default_factory=lambda: Manifest("store", "synthetic"))

    @property
    def num_groups(self) -> int:
        return len(self.group_offsets) - 1

    @property
    def num_trajectories(self) -> int:
        return int(self.group_offsets[-1])

    @property
    def on_policy(self) -> BoolArray:
        return np.zeros(self.num_trajectories, dtype=np.bool_)

    @property
    def truncated(self) -> BoolArray:
        return np.zeros(self.num_trajectories, dtype=np.bool_)

    @property
    def has_behaviour_logprobs(self) -> BoolArray:
        return np.zeros(self.num_trajectories, dtype=np.bool_)

    @property
    def validation_groups(self) -> BoolArray:
        return np.zeros(self.num_groups, dtype=np.bool_)


def synthetic_store(num_sequences: int) -> LengthStore:
    """Groups of eight with log-normal responses, of the size of the released recipe's data.

    Responses of 4,900 tokens in the median, cut at 31,744; prompts of 50 to 499 tokens.
    """
    generator = np.random.default_rng(0)
    groups = num_sequences // 8
    return LengthStore(
        group_offsets=8 * np.arange(groups + 1, dtype=np.int64),
        prompt_lengths=np.repeat(generator.integers(50, 500, groups), 8),
        response_lengths=np.minimum(31744, generator.lognormal(8.5, 0.9, 8 * groups)).astype(np.int64),
        rewards=(generator.random(8 * groups) < 0.6).astype(np.float64),
    )


def compare_sharing(file: Path, max_tokens: int) -> list[str]:
    """A row for the plan of a file with every trajectory apart, and one with shared prompts."""
    groups = read_groups(file)
    sizes = [len(group.responses) for group in groups]
    prompts = np.array([max(1, group.prompt) for group in groups], dtype=np.int64)
    store = LengthStore(
        group_offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        prompt_lengths=np.repeat(prompts, sizes),
        response_lengths=np.concatenate(
            [np.clip(group.responses, 1, max_tokens - prompt) for group, prompt in zip(groups, prompts, strict=True)]
        ),
        rewards=np.concatenate([group.labels for group in groups]).astype(np.float64),
    )
    rows = []
    for rule in RULES:
        settings = PlanConfig(
            groups_per_step=GROUPS_PER_STEP,
            trajectories_per_group=None,
            max_pack_tokens=max_tokens,
            pack_multiple=PACK_MULTIPLE,
            equal_parts=EQUAL_PARTS,
            share_prompts=rule,
        )
        plan = build_plan(store, settings, OBJECTIVE)
        counts = plan.manifest.counts
        worst = [balance(plan, SHAPE, LayoutConfig(), num_gpus=dp) for dp in DATA_PARALLEL]
        uneven = "".join(
            " " * 13
            if even.worst_with_enough_packs is None
            else f" {100 * even.worst_with_enough_packs:7.2f} ({even.steps_with_enough_packs:2})"
            for even in worst
        )
        fill = 100 * counts["tokens"] / counts["padded_tokens"]
        rows.append(f"  {rule:12} {counts['packs']:6} {fill:8.2f} {counts['padded_tokens']:8,}{uneven}")
    automatic = build_plan(store, replace(settings, share_prompts="auto"), OBJECTIVE).manifest.counts
    chosen = "shared" if automatic["shared_prompt_tokens"] else "apart"
    return [f"{file.name.removesuffix('.jsonl.gz')} at {max_tokens}, auto: {chosen}", *rows]


def never_called(*_: object) -> None:
    raise AssertionError("planning computes no surrogate and no divergence")


OBJECTIVE = ObjectiveConfig(advantage=advantages.mean_only, surrogate=never_called, kl=never_called)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--sequences", type=int, default=1_000_000)
    arguments = parser.parse_args()
    files = sorted((arguments.data / "trajectories").glob("*.jsonl.gz"))
    if files:
        print(f"steps of {GROUPS_PER_STEP} groups; fill in % of the tokens computed, packs padded to {PACK_MULTIPLE}:")
        print(
            "each pack at its own length (own), and all packs of a step as long as its longest (one); imbalance of the"
        )
        print(
            f"ranks' FLOPs in %, in the worst of the (steps) with {ENOUGH_PACKS} packs a rank or more, assigned alike"
        )
        print("  packing       packs fill:own fill:one" + "".join(f"        dp={dp:<2}" for dp in DATA_PARALLEL))
        for max_tokens in (8192, 32768):
            for file in files:
                print("\n".join(compare(file, max_tokens)), flush=True)
        print(
            "plans with trajectories apart (never) and with shared prompts (always); tokens computed, padding included:"
        )
        print("  prompts       packs     fill   tokens" + "".join(f"        dp={dp:<2}" for dp in DATA_PARALLEL))
        for max_tokens in (8192, 32768):
            for file in files:
                print("\n".join(compare_sharing(file, max_tokens)), flush=True)
    else:
        print(f"no trajectories/*.jsonl.gz in {arguments.data}: only the synthetic run")
    store = synthetic_store(arguments.sequences)
    start, start_cpu = time.perf_counter(), time.process_time()
    plan = build_plan(store, PlanConfig(groups_per_step=GROUPS_PER_STEP), OBJECTIVE)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    counts = plan.manifest.counts
    fill = 100 * counts["tokens"] / counts["padded_tokens"]
    print(
        f"{counts['trajectories']:,} synthetic sequences planned in {seconds:.1f} s ({cpu_seconds:.1f} s of one core):"
    )
    print(f"{plan.num_steps} steps, {plan.num_packs} packs, fill {fill:.3f} %")


if __name__ == "__main__":
    main()
