"""STORE: tokenised trajectory groups on disk, in Arrow, one row a group."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from megatron_offgrpo.artifacts import Manifest, atomic_folder, fingerprint_of, read_manifest, write_manifest
from megatron_offgrpo.errors import DataError
from megatron_offgrpo.types import BoolArray, FloatArray, IntArray, TokenizedTrajectory

GROUPS_FOLDER = "groups"
REJECTED_FILE = "rejected.jsonl"
REMEDY = "run `offgrpo prepare` again"
ROWS_PER_BATCH = 256

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
    }
)
"""Columns of the store; every list but `prompt_ids` has one entry a trajectory of the group."""

# What a training run reads; the rest (texts, sources, given rewards) is provenance.
_FINGERPRINTED = ("group_id", "prompt_ids", "response_ids", "rewards", "on_policy", "truncated", "behaviour_logprobs")


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


@dataclass(frozen=True)
class TrajectoryStore:
    """A finished store; trajectories are numbered over all groups in row order."""

    path: Path
    manifest: Manifest
    table: Any
    """`pyarrow.Table`, memory-mapped."""

    @classmethod
    def open(cls, path: str | Path) -> "TrajectoryStore":
        """Opens the store in `path`.

        Raises:
            DataError: no finished store there, or its Arrow files cannot be read.
        """
        import datasets

        folder = Path(path)
        manifest = read_manifest(folder, "store", remedy=f"offgrpo prepare --input FILE --output {folder}")
        try:
            table = datasets.load_from_disk(str(folder / GROUPS_FOLDER)).data.table
        except (OSError, ValueError, pa.ArrowException) as cause:
            raise DataError(f"unreadable store ({cause})", where=str(folder), remedy=REMEDY) from None
        missing = [name for name in SCHEMA.names if name not in table.column_names]
        if missing or table.num_rows != manifest.counts["groups"]["total"]:
            raise DataError(
                "the store's tables do not fit its manifest",
                where=str(folder),
                expected=f"{manifest.counts['groups']['total']} groups with columns {', '.join(SCHEMA.names)}",
                got=f"{table.num_rows} groups, missing columns: {', '.join(missing) or 'none'}",
                remedy=REMEDY,
            )
        return cls(folder, manifest, table)

    @property
    def num_groups(self) -> int:
        return int(self.table.num_rows)

    @property
    def num_trajectories(self) -> int:
        return int(self.group_offsets[-1])

    @cached_property
    def group_offsets(self) -> IntArray:
        """int64 [num_groups + 1]; the trajectories of group g are group_offsets[g]:group_offsets[g + 1]."""
        sizes = _lengths(self.table["response_ids"].chunks)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])

    @cached_property
    def group_index(self) -> IntArray:
        """int64 [num_trajectories]; the group of each trajectory."""
        return np.repeat(np.arange(self.num_groups, dtype=np.int64), np.diff(self.group_offsets))

    @cached_property
    def prompt_lengths(self) -> IntArray:
        """int64 [num_trajectories], tokens of the prompt of each trajectory's group."""
        return _lengths(self.table["prompt_ids"].chunks)[self.group_index]

    @cached_property
    def response_lengths(self) -> IntArray:
        """int64 [num_trajectories], tokens of each response, EOS included."""
        return _lengths([chunk.flatten() for chunk in self.table["response_ids"].chunks])

    @cached_property
    def rewards(self) -> FloatArray:
        """float64 [num_trajectories], 0 or 1."""
        return self._flat("rewards", np.float64)

    @cached_property
    def given_rewards(self) -> FloatArray:
        """float64 [num_trajectories], rewards of the input; NaN where none was given."""
        return self._flat("given_rewards", np.float64)

    @cached_property
    def on_policy(self) -> BoolArray:
        """bool [num_trajectories]."""
        return self._flat("on_policy", np.bool_)

    @cached_property
    def truncated(self) -> BoolArray:
        """bool [num_trajectories]; the response was cut and has no EOS."""
        return self._flat("truncated", np.bool_)

    def trajectory(self, index: int) -> TokenizedTrajectory:
        """The token ids of trajectory `index`; views of the memory-mapped file where Arrow allows it."""
        group = int(self.group_index[index])
        member = index - int(self.group_offsets[group])
        logprobs = self.table["behaviour_logprobs"][group].values[member].values
        return TokenizedTrajectory(
            prompt_ids=_to_numpy(self.table["prompt_ids"][group].values, np.int32),
            response_ids=_to_numpy(self.table["response_ids"][group].values[member].values, np.int32),
            behaviour_logprobs=None if logprobs is None else _to_numpy(logprobs, np.float32),
        )

    def row(self, group: int) -> StoreRow:
        """All columns of one group as Python values."""
        return StoreRow(**self.table.slice(group, 1).to_pylist()[0])

    def _flat(self, column: str, dtype: Any) -> Any:
        chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in self.table[column].chunks]
        return np.concatenate([np.zeros(0, dtype), *chunks]).astype(dtype)


def write_store(
    path: str | Path,
    rows: Iterable[StoreRow],
    *,
    tokenizer_fingerprint: str,
    inputs: dict[str, str],
    counts: dict[str, Any],
    config: dict[str, Any],
    rejected: Path | None = None,
) -> TrajectoryStore:
    """Writes the rows as a store that appears under `path` only when it is complete.

    Args:
        rows: read once, in order; may be a generator.
        inputs: name -> fingerprint of what the store was made from, beside the tokenizer.
        counts: read after the last row, so the caller may fill it while the rows pass; groups and trajectories
            are counted here.
        rejected: file of rejected records to keep inside the store; an empty one is written without it.

    Raises:
        DataError: no row at all, or a row whose lists have different lengths.
    """
    with atomic_folder(Path(path)) as folder:
        digest, group_counts = hashlib.sha256(), {"total": 0, "all_positive": 0, "mixed": 0, "all_negative": 0}
        tokens = {"trajectories": 0, "truncated": 0, "prompt_tokens": 0, "response_tokens": 0}
        _write_groups(folder, _observed(rows, digest, group_counts, tokens))
        if group_counts["total"] == 0:
            raise DataError("no group is left to store", where=str(path))
        rejected_bytes = rejected.read_bytes() if rejected is not None else b""
        (folder / REJECTED_FILE).write_bytes(rejected_bytes)
        manifest = Manifest(
            kind="store",
            fingerprint=digest.hexdigest()[:32],
            inputs={"tokenizer": tokenizer_fingerprint, **inputs},
            counts={"groups": group_counts, **tokens, **counts},
            config=config,
        )
        write_manifest(folder, manifest)
    return TrajectoryStore.open(path)


def _write_groups(folder: Path, rows: Iterator[StoreRow]) -> None:
    """Streams the rows into an Arrow file, then lets `datasets` save it in its own layout."""
    import datasets

    stream = folder / "rows.arrow"
    with pa.OSFile(str(stream), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        batch: list[dict[str, Any]] = []
        for row in rows:
            batch.append({column.name: getattr(row, column.name) for column in fields(row)})
            if len(batch) == ROWS_PER_BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=SCHEMA))
                batch = []
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=SCHEMA))
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        datasets.Dataset.from_file(str(stream)).save_to_disk(str(folder / GROUPS_FOLDER))
    finally:
        if not shown:
            datasets.enable_progress_bars()
    stream.unlink()


def _observed(
    rows: Iterable[StoreRow], digest: Any, group_counts: dict[str, int], tokens: dict[str, int]
) -> Iterator[StoreRow]:
    """Passes rows on; adds each to the content digest and the counts."""
    for row in rows:
        _check_row(row)
        digest.update(fingerprint_of([getattr(row, name) for name in _FINGERPRINTED]).encode())
        group_counts["total"] += 1
        group_counts[composition(row.rewards)] += 1
        tokens["trajectories"] += len(row.response_ids)
        tokens["truncated"] += sum(row.truncated)
        tokens["prompt_tokens"] += len(row.prompt_ids)
        tokens["response_tokens"] += sum(map(len, row.response_ids))
        yield row


def _check_row(row: StoreRow) -> None:
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


def tokenizer_fingerprint(tokenizer_dir: str | Path) -> str:
    """Fingerprint of what turns text into ids: vocabulary files, chat template and EOS token, not of file layout.

    Raises:
        DataError: the folder holds no tokenizer.
    """
    folder = Path(tokenizer_dir)
    config = _read_json(folder / "tokenizer_config.json")
    special = _read_json(folder / "special_tokens_map.json")
    vocabulary = _read_json(folder / "tokenizer.json")
    # Padding and truncation are call-time settings that some libraries leave in the file.
    parts: list[object] = [{name: value for name, value in vocabulary.items() if name not in ("padding", "truncation")}]
    if not vocabulary:
        names = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "added_tokens.json")
        found = [folder / name for name in names if (folder / name).is_file()]
        if not found:
            raise DataError(
                "no tokenizer here",
                where=str(folder),
                expected="tokenizer.json or the tokenizer's vocabulary files",
                remedy="pass the Hugging Face folder of the student with --tokenizer",
            )
        for path in found:
            parts += [path.name, path.read_bytes()]
    eos = config.get("eos_token") or special.get("eos_token")
    template_file = folder / "chat_template.jinja"
    template = template_file.read_text(encoding="utf-8") if template_file.is_file() else config.get("chat_template")
    return fingerprint_of(*parts, eos["content"] if isinstance(eos, dict) else eos, template)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise DataError(f"unreadable tokenizer file ({cause})", where=str(path)) from None
    return value


def _lengths(chunks: list[Any]) -> IntArray:
    """Lengths of the entries of list arrays, one after another."""
    parts = [pc.list_value_length(chunk).to_numpy(zero_copy_only=False) for chunk in chunks]
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


def _to_numpy(values: Any, dtype: Any) -> npt.NDArray[Any]:
    array = values.to_numpy(zero_copy_only=False)
    return np.asarray(array, dtype)
