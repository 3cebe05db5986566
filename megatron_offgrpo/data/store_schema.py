"""Columns of the store, one row a trajectory group, and what identifies a row."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_offgrpo.artifacts import fingerprint_of
from megatron_offgrpo.errors import DataError

_TOKENS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    {
        "group_id": pa.string(),
        "problem": pa.string(),
        "answer": pa.string(),
        "prompt_ids": _TOKENS,
        "response_ids": pa.list_(_TOKENS),
        "rewards": pa.list_(pa.float32()),
        "given_rewards": pa.list_(pa.float32()),
        "label_statuses": pa.list_(pa.string()),
        "sources": pa.list_(pa.string()),
        "on_policy": pa.list_(pa.bool_()),
        "truncated": pa.list_(pa.bool_()),
        "behaviour_logprobs": pa.list_(pa.list_(pa.float32())),
        "sample_ids": pa.list_(pa.string()),
        "texts": pa.list_(pa.string()),
        "label_sources": pa.list_(pa.string()),
        "verified_rewards": pa.list_(pa.float32()),
        "majority_rewards": pa.list_(pa.float32()),
        "extracted": pa.list_(pa.string()),
        "system": pa.string(),
        "origin": pa.string(),
        "validation": pa.bool_(),
        "finish_reasons": pa.list_(pa.string()),
    }
)
"""Columns of the store; every list but `prompt_ids` has one entry a trajectory of the group, or is null."""


@dataclass(frozen=True)
class StoreRow:
    """One tokenised group; lists have one entry a trajectory."""

    group_id: str
    problem: str
    answer: str
    prompt_ids: list[int]
    response_ids: list[list[int]]
    """Each ends in EOS unless `truncated`."""
    rewards: list[float]
    given_rewards: list[float | None]
    """Rewards that came with the input, whatever label was asked for."""
    label_statuses: list[str]
    """How each reward came about: `given`, or the status of its grading (`ok`, `no_answer`, `timeout`, ...)."""
    sources: list[str | None]
    on_policy: list[bool]
    truncated: list[bool]
    behaviour_logprobs: list[list[float] | None]
    sample_ids: list[str | None]
    texts: list[str]
    label_sources: list[str] | None = None
    """Whose reward it is: `math-verify`, `majority` or `given`."""
    verified_rewards: list[float | None] | None = None
    majority_rewards: list[float | None] | None = None
    extracted: list[str | None] | None = None
    """The final answer as math-verify reads it."""
    system: str | None = None
    origin: str = ""
    """file:line of the group's record."""
    validation: bool = False
    """Set apart from training."""
    finish_reasons: list[str | None] | None = None
    """`length` where the generator cut the text, `stop` where it ended, None where the input does not say."""


def row_fingerprint(row: StoreRow) -> str:
    """32 hex digits over what a training run reads of a row; the rest (texts, sources, given rewards) is provenance.

    `validation` is hashed beside it, in the fingerprint of the store.
    """
    logprobs = row.behaviour_logprobs
    return fingerprint_of(
        row.group_id,
        _packed(row.prompt_ids, "<i4"),
        _packed([len(ids) for ids in row.response_ids], "<i4"),
        _packed(chain.from_iterable(row.response_ids), "<i4"),
        _packed(row.rewards, "<f8"),
        _packed(row.on_policy, "?"),
        _packed(row.truncated, "?"),
        _packed([-1 if one is None else len(one) for one in logprobs], "<i4"),
        _packed(chain.from_iterable(one for one in logprobs if one is not None), "<f4"),  # as they are stored
    )


def _packed(values: Iterable[Any], dtype: str) -> bytes:
    return np.fromiter(values, np.dtype(dtype)).tobytes()


def record_batch(rows: list[StoreRow]) -> Any:
    """The rows as a `pyarrow.RecordBatch`."""
    values = [{column.name: getattr(row, column.name) for column in fields(row)} for row in rows]
    return pa.RecordBatch.from_pylist(values, schema=SCHEMA)


def check_row(row: StoreRow) -> None:
    """Refuses a row whose lists have different lengths.

    Raises:
        DataError: naming the group.
    """
    columns = {name: value for name, value in vars(row).items() if isinstance(value, list) and name != "prompt_ids"}
    lengths = {name: len(value) for name, value in columns.items()}
    if len(set(lengths.values())) != 1 or lengths["response_ids"] == 0:
        raise DataError("lists of different lengths in one group", where=f"group {row.group_id}", got=lengths)


def composition(rewards: Iterable[float]) -> str:
    """`all_positive`, `mixed` or `all_negative`."""
    values = list(rewards)
    if all(value == 1 for value in values):
        return "all_positive"
    return "mixed" if any(value == 1 for value in values) else "all_negative"
