"""What a store holds, measured in one pass: compositions, lengths, duplicates, contamination, examples."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_offgrpo.data.decontamination import BenchmarkIndex
from megatron_offgrpo.data.near_duplicates import NUM_PERMUTATIONS, linked_heads, signatures
from megatron_offgrpo.data.references import reference_fault
from megatron_offgrpo.data.store import TrajectoryStore, composition
from megatron_offgrpo.data.text_measures import hash_64, jaccard, normalised, shingles
from megatron_offgrpo.progress import progress

NEAR = 0.8
"""Jaccard similarity of near-duplicates."""
NUM_EXAMPLES = 2
BENCHMARK_WORDS = 13


@dataclass
class Audit:
    """The figures of `offgrpo inspect` that are not in the manifest."""

    right_of: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(right, size) -> groups."""
    examples: dict[str, list[int]] = field(default_factory=dict)
    """Composition -> numbers of a few groups."""
    duplicate_trajectories: int = 0
    """Texts that stand in their group before, outer white space aside."""
    duplicate_problems: int = 0
    near_duplicates: list[tuple[int, int, float]] = field(default_factory=list)
    """(group, the first of its cluster, their Jaccard similarity); exact duplicates included."""
    contaminated: list[tuple[int, str, str]] = field(default_factory=list)
    """(group, file:line of the benchmark, shared n-gram); only for benchmarks that were asked for."""
    benchmarks: tuple[str, ...] = ()
    unverifiable: Counter[str] = field(default_factory=Counter)
    """Kind of fault, such as `placeholder` -> groups whose reference answer no solution can match."""


def audit(store: TrajectoryStore, benchmarks: Sequence[str] = ()) -> Audit:
    """Measures a store.

    Args:
        benchmarks: files whose problems are looked for.

    Raises:
        DataError: an unreadable benchmark.
    """
    index = BenchmarkIndex(benchmarks, BENCHMARK_WORDS) if benchmarks else None
    found = Audit(examples={"all_positive": [], "mixed": [], "all_negative": []}, benchmarks=tuple(benchmarks))
    seen: set[int] = set()
    minhash = np.zeros((store.num_groups, NUM_PERMUTATIONS), np.uint32)
    first = 0
    with progress("inspect", store.num_groups) as advance:
        for batch in store.table.select(["problem", "answer", "rewards", "texts"]).to_batches(max_chunksize=256):
            problems = batch["problem"].to_pylist()
            minhash[first : first + len(problems)] = signatures(problems)
            found.unverifiable.update(filter(None, map(reference_fault, batch["answer"].to_pylist())))
            for place, problem in enumerate(problems):
                _add_group(found, first + place, batch["rewards"][place].as_py(), batch["texts"][place].as_py())
                key = hash_64(normalised(problem))
                found.duplicate_problems += key in seen
                seen.add(key)
                if index is not None and (overlap := index.find(problem)) is not None:
                    found.contaminated.append((first + place, overlap.partner, overlap.overlap))
            first += len(problems)
            advance(len(problems))
    found.near_duplicates = _near_duplicates(store.table["problem"], minhash)
    return found


def _add_group(found: Audit, group: int, rewards: list[float], texts: list[str]) -> None:
    found.right_of[int(sum(rewards)), len(rewards)] += 1
    examples = found.examples[composition(rewards)]
    if len(examples) < NUM_EXAMPLES:
        examples.append(group)
    found.duplicate_trajectories += len(texts) - len({text.strip() for text in texts})


def _near_duplicates(problems: Any, minhash: Any) -> list[tuple[int, int, float]]:
    @lru_cache(maxsize=4096)
    def shingles_of(group: int) -> frozenset[str]:
        return frozenset(shingles(problems[group].as_py()))

    def similarity(one: int, other: int) -> float:
        return jaccard(set(shingles_of(one)), set(shingles_of(other)))

    head = linked_heads(minhash, np.ones(len(minhash), np.bool_), NEAR, lambda a, b: similarity(a, b) >= NEAR)
    linked = np.flatnonzero(head != np.arange(len(head))).tolist()
    return [(group, int(head[group]), similarity(group, int(head[group]))) for group in linked]


def quantiles(values: Any) -> dict[str, int]:
    """Least, 10 %, median, 90 %, 99 % and greatest value; empty where there are none."""
    if not len(values):
        return {}
    names = {"least": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "most": 1.0}
    return {name: round(float(np.quantile(values, share))) for name, share in names.items()}
