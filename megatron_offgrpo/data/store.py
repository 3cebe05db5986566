"""STORE: tokenised trajectory groups on disk, in Arrow, one row a group."""

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from megatron_offgrpo.artifacts import Manifest, fingerprint_of, read_manifest
from megatron_offgrpo.data.store_schema import SCHEMA, StoreRow, composition
from megatron_offgrpo.data.store_writer import GROUPS_FOLDER, LIST_FILES, write_batches, write_rows
from megatron_offgrpo.errors import DataError
from megatron_offgrpo.types import BoolArray, FloatArray, IntArray, TokenizedTrajectory

__all__ = ["StoreRow", "TrajectoryStore", "composition", "write_store"]

REMEDY = "run `offgrpo prepare` again, with --force"


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
    def has_behaviour_logprobs(self) -> BoolArray:
        """bool [num_trajectories]; log-probs of the generator came with the trajectory."""
        chunks = [chunk.flatten().is_valid() for chunk in self.table["behaviour_logprobs"].chunks]
        return np.concatenate([np.zeros(0, np.bool_), *(chunk.to_numpy(zero_copy_only=False) for chunk in chunks)])

    @cached_property
    def truncated(self) -> BoolArray:
        """bool [num_trajectories]; the response was cut and has no EOS."""
        return self._flat("truncated", np.bool_)

    @cached_property
    def largest_id(self) -> int:
        """The largest token id of all prompts and responses."""
        prompts = [chunk.flatten() for chunk in self.table["prompt_ids"].chunks]
        responses = [chunk.flatten().flatten() for chunk in self.table["response_ids"].chunks]
        return max((pc.max(ids).as_py() or 0 for ids in (*prompts, *responses)), default=0)

    @cached_property
    def validation_groups(self) -> BoolArray:
        """bool [num_groups]; set apart from training."""
        chunks = [chunk.to_numpy(zero_copy_only=False) for chunk in self.table["validation"].chunks]
        return np.concatenate([np.zeros(0, np.bool_), *chunks]).astype(np.bool_)

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
) -> TrajectoryStore:
    """Writes the rows as a store that appears under `path` only when it is complete.

    Args:
        rows: read once, in order; may be a generator.
        inputs: name -> fingerprint of what the store was made from, beside the tokenizer.
        counts: read after the last row, so the caller may fill it while the rows pass; groups and trajectories
            are counted here.

    Raises:
        DataError: no row at all, or a row whose lists have different lengths.
    """
    with tempfile.TemporaryDirectory() as scratch:
        empty = Path(scratch) / "empty"
        empty.touch()
        write_batches(
            Path(path),
            write_rows(rows),
            tokenizer_fingerprint=tokenizer_fingerprint,
            inputs=inputs,
            counts=counts,
            config=config,
            lists=dict.fromkeys(LIST_FILES, empty),
        )
    return TrajectoryStore.open(path)


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
