"""How many problems of a benchmark stand in a training store, in whole or in part."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.data.text_measures import normalised, words
from megatron_offgrpo.evaluation.benchmarks import Question

NUM_WORDS = 13
"""Length of a shared run of words that counts as overlap (Brown et al. 2020, appendix C)."""
SHOWN = 20


def contamination(questions: Sequence[Question], store_dir: Path) -> dict[str, Any]:
    """Benchmark problems that share 13 words in a row, or their whole text, with a problem of the store.

    Returns:
        the store's fingerprint, `overlapping` (a count), `share`, and the first `problem_ids`.
    """
    store = TrajectoryStore.open(store_dir)
    problems = (text for chunk in store.table["problem"].chunks for text in chunk.to_pylist())
    found = overlapping(questions, problems)
    return {
        "store": str(store_dir),
        "store_fingerprint": store.manifest.fingerprint,
        "num_words": NUM_WORDS,
        "overlapping": len(found),
        "share": len(found) / len(questions),
        "problem_ids": found[:SHOWN],
    }


def overlapping(questions: Sequence[Question], training: Iterable[str]) -> list[str]:
    """Ids of the questions that overlap with a training problem, in the benchmark's order."""
    grams: dict[str, set[str]] = {}
    texts: dict[str, set[str]] = {}
    for question in questions:
        texts.setdefault(normalised(question.problem), set()).add(question.problem_id)
        for gram in _grams(question.problem):
            grams.setdefault(gram, set()).add(question.problem_id)
    hits: set[str] = set()
    for problem in training:
        hits |= texts.get(normalised(problem), set())
        for gram in _grams(problem):
            hits |= grams.get(gram, set())
    return [question.problem_id for question in questions if question.problem_id in hits]


def _grams(text: str) -> set[str]:
    found = words(text)
    return {" ".join(found[at : at + NUM_WORDS]) for at in range(len(found) - NUM_WORDS + 1)}
