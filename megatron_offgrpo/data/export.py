"""A store as Parquet in the columns of verl and LUFFY, so that peers train on the same data."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.errors import DataError

INFO = {
    "finish_reason": "finish_reasons",
    "logprobs": "behaviour_logprobs",
    "on_policy": "on_policy",
    "sample_id": "sample_ids",
    "source": "sources",
}
"""Field of `target_info` -> column of the store."""
COLUMNS = ["group_id", "problem", "answer", "rewards", "texts", "system", "validation", *INFO.values()]
_MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
VERL_SCHEMA = pa.schema(
    {
        "data_source": pa.string(),
        "prompt": _MESSAGES,
        "target": _MESSAGES,
        "target_lst": pa.list_(_MESSAGES),
        "target_rewards": pa.list_(pa.float32()),
        "target_info": pa.list_(
            pa.struct(
                {
                    "finish_reason": pa.string(),
                    "logprobs": pa.list_(pa.float32()),
                    "on_policy": pa.bool_(),
                    "sample_id": pa.string(),
                    "source": pa.string(),
                }
            )
        ),
        "ability": pa.string(),
        "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),
        "extra_info": pa.struct({"group_id": pa.string(), "index": pa.int64(), "split": pa.string()}),
    }
)


def export_verl(store: TrajectoryStore, path: Path, *, overwrite: bool = False) -> str:
    """Writes one row a group: `target` the first right solution (the first where none is), `target_lst` all of them.

    Responses that the store cut stand with their whole text: that cut belongs to its tokenizer and its limit.
    `target_info` is what else `prepare` needs to make the same store again. Returns what was written, in a line.

    Raises:
        DataError: the file exists, or is not called .parquet.
    """
    if path.suffix != ".parquet":
        raise DataError("not a Parquet file", where=str(path), expected="a name that ends in .parquet")
    if path.exists() and not overwrite:
        raise DataError("already exists", where=str(path), remedy="pass --overwrite or choose another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    number = 0
    with pq.ParquetWriter(temporary, VERL_SCHEMA) as writer:
        for batch in store.table.to_batches():
            rows = [_row(row, number + index) for index, row in enumerate(batch.select(COLUMNS).to_pylist())]
            number += len(rows)
            writer.write_table(pa.Table.from_pylist(rows, schema=VERL_SCHEMA))
    os.replace(temporary, path)
    return f"{path}: {number} groups, {store.num_trajectories} solutions"


def _row(row: dict[str, Any], index: int) -> dict[str, Any]:
    prompt = [{"role": "user", "content": row["problem"]}]
    if row["system"] is not None:
        prompt.insert(0, {"role": "system", "content": row["system"]})
    targets = [[{"role": "assistant", "content": text}] for text in row["texts"]]
    no_entries = [None] * len(targets)
    first_right = next((place for place, reward in enumerate(row["rewards"]) if reward == 1), 0)
    return {
        "data_source": "megatron_offgrpo",
        "prompt": prompt,
        "target": targets[first_right],
        "target_lst": targets,
        "target_rewards": row["rewards"],
        "target_info": [
            {name: (row[column] or no_entries)[place] for name, column in INFO.items()} for place in range(len(targets))
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": row["answer"]},
        "extra_info": {
            "group_id": row["group_id"],
            "index": index,
            "split": "validation" if row["validation"] else "train",
        },
    }
