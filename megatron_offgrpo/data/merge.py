"""Finished parts to the store: duplicates over all parts, the validation split, and the batches in order."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa

from megatron_offgrpo.data.labelling import LabelCounts
from megatron_offgrpo.data.near_duplicates import NUM_PERMUTATIONS, linked_heads
from megatron_offgrpo.data.part_files import COMPOSITIONS, PartFolder, PartNotes, column
from megatron_offgrpo.data.part_worker import STAGES
from megatron_offgrpo.data.rejects import RecordError, Reject, Removal, reject_of
from megatron_offgrpo.data.store_schema import SCHEMA
from megatron_offgrpo.data.store_writer import DISAGREEMENTS_FILE, REJECTED_FILE, REMOVED_FILE
from megatron_offgrpo.data.text_measures import jaccard, shingles
from megatron_offgrpo.data_config import PrepareConfig
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.types import BoolArray, IntArray

SPLIT_SIMILARITY = 0.8
"""Problems as similar as this stay on one side of the split, where no other threshold was asked for."""
SIGNATURES_FILE = "signatures.u32"
KEPT, SAME_ID, SAME_PROBLEM, NEAR_PROBLEM, TOO_MANY_POSITIVE = range(5)


@dataclass
class Rows:
    """All rows of all parts, in order, without their texts and tokens: about 30 bytes a row."""

    first: IntArray
    """[num_parts + 1] number of the first row of each part."""
    id_hash: Any
    problem_hash: Any
    composition: Any
    fate: Any
    """[N] KEPT or why not."""
    partner: IntArray
    """[N] the row that it duplicates, or -1."""
    validation: BoolArray


def read_rows(folder: PartFolder, num_parts: int) -> Rows:
    """Reads the light columns of all parts."""
    found: dict[str, list[Any]] = {"id_hash": [], "problem_hash": [], "composition": []}
    kinds = {"id_hash": np.uint64, "problem_hash": np.uint64, "composition": np.int8}
    sizes = []
    for part in range(num_parts):
        batch = folder.rows(part)
        sizes.append(batch.num_rows)
        for name, parts in found.items():
            parts.append(column(batch, name, kinds[name]))
    whole = {name: np.concatenate([np.zeros(0, kinds[name]), *parts]) for name, parts in found.items()}
    number = len(whole["id_hash"])
    return Rows(
        first=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        fate=np.zeros(number, np.int8),
        partner=np.full(number, -1, np.int64),
        validation=np.zeros(number, np.bool_),
        **whole,
    )


def decide(rows: Rows, folder: PartFolder, config: PrepareConfig) -> None:
    """Fills in fate, partner and validation of all rows.

    Raises:
        ConfigError: a validation share that leaves one side without a group.
    """
    filters = config.filters
    _drop_equal(rows, rows.id_hash, SAME_ID)
    if filters.duplicate_problems:
        _drop_equal(rows, rows.problem_hash, SAME_PROBLEM)
    head = np.arange(len(rows.fate), dtype=np.int64)
    if filters.near_duplicates is not None or config.validation_share > 0:
        threshold = filters.near_duplicates or SPLIT_SIMILARITY
        texts = _Problems(rows, folder)
        head = linked_heads(_signatures(rows, folder), rows.fate == KEPT, threshold, texts.similar(threshold))
    if filters.near_duplicates is not None:
        linked = (rows.fate == KEPT) & (head != np.arange(len(head)))
        rows.fate[linked], rows.partner[linked] = NEAR_PROBLEM, head[linked]
    _limit_all_positive(rows, filters.max_all_positive_share, config.seed)
    if config.validation_share > 0:
        _split(rows, head, config.validation_share, config.seed)


def _drop_equal(rows: Rows, keys: Any, fate: int) -> None:
    """Of kept rows with one key the first stays."""
    kept = np.flatnonzero(rows.fate == KEPT)
    order = kept[np.argsort(keys[kept], kind="stable")]
    ordered = keys[order]
    starts = np.ones(len(order), np.bool_)
    starts[1:] = ordered[1:] != ordered[:-1]
    firsts = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
    again = order[~starts]
    rows.fate[again], rows.partner[again] = fate, firsts[~starts]


def _limit_all_positive(rows: Rows, share: float, seed: int) -> None:
    """Leaves out all-positive groups, the ones with the highest keys, until they are at most `share` of the groups."""
    if share >= 1.0:
        return
    kept = rows.fate == KEPT
    positive = np.flatnonzero(kept & (rows.composition == COMPOSITIONS.index("all_positive")))
    num_others = int(kept.sum()) - len(positive)
    allowed = int(np.floor(share * num_others / (1 - share) + 1e-9))
    order = np.lexsort((positive, _keys(rows.id_hash[positive], seed)))
    rows.fate[positive[order[allowed:]]] = TOO_MANY_POSITIVE


def _split(rows: Rows, head: IntArray, share: float, seed: int) -> None:
    """Sets whole clusters apart, in the order of their keys, until about `share` of the groups are."""
    kept = np.flatnonzero(rows.fate == KEPT)
    if len(kept) == 0:
        return  # the caller says what became of them
    wanted = max(1, round(share * len(kept)))
    heads, inverse, sizes = np.unique(head[kept], return_inverse=True, return_counts=True)
    apart = np.zeros(len(heads), np.bool_)
    num_apart = 0
    for cluster in np.lexsort((heads, _keys(rows.problem_hash[heads], seed))).tolist():
        if num_apart + sizes[cluster] <= wanted:
            apart[cluster] = True
            num_apart += int(sizes[cluster])
        if num_apart == wanted:
            break
    if num_apart in (0, len(kept)):
        raise ConfigError(
            "this share leaves one side without a group",
            where="--validation-share",
            expected="a share for which some clusters of near-duplicates fit on both sides",
            got=f"{share} of {len(kept)} groups in {len(heads)} clusters, the largest of {sizes.max()}",
        )
    rows.validation[kept] = apart[inverse]


def _keys(hashes: Any, seed: int) -> Any:
    """uint64 keys that look random and depend on hash and seed alone (splitmix64)."""
    offset = np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % (1 << 64))
    mixed = np.asarray(hashes, np.uint64) + offset
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def _signatures(rows: Rows, folder: PartFolder) -> Any:
    """uint32 [N, 128] of all rows, memory-mapped from a file beside the parts."""
    path = folder.path / SIGNATURES_FILE
    with path.open("wb") as file:
        for part in range(len(rows.first) - 1):
            file.write(folder.rows(part)["signature"].flatten().to_numpy(zero_copy_only=False).tobytes())
    if not len(rows.fate):
        return np.zeros((0, NUM_PERMUTATIONS), np.uint32)
    return np.memmap(path, np.uint32, "r", shape=(len(rows.fate), NUM_PERMUTATIONS))


class _Problems:
    """Texts of problems by number of the row."""

    def __init__(self, rows: Rows, folder: PartFolder) -> None:
        self.rows, self.folder = rows, folder
        self.shingles = lru_cache(maxsize=4096)(self._shingles)

    def _shingles(self, row: int) -> frozenset[str]:
        return frozenset(shingles(self.value(row, "problem")))

    def value(self, row: int, name: str) -> str:
        part = int(np.searchsorted(self.rows.first, row, side="right")) - 1
        text: str = self.folder.rows(part)[name][row - int(self.rows.first[part])].as_py()
        return text

    def similarity(self, one: int, other: int) -> float:
        return jaccard(set(self.shingles(one)), set(self.shingles(other)))

    def similar(self, threshold: float) -> Any:
        return lambda one, other: self.similarity(one, other) >= threshold


@dataclass
class Summary:
    """What the parts and the merging left out and counted."""

    rejected: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    ignored_fields: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    labels: LabelCounts = field(default_factory=LabelCounts)
    fates: Counter[int] = field(default_factory=Counter)
    """Fate -> rows."""
    fate_trajectories: Counter[int] = field(default_factory=Counter)
    last_reject: str | None = None

    def add_notes(self, notes: PartNotes) -> None:
        self.parts.update(notes.counts)
        self.ignored_fields.update(notes.ignored_fields)
        self.labels.statuses.update(notes.statuses)
        self.labels.labels.update(notes.label_sources)
        self.labels.compared.update(notes.compared)

    def as_counts(self) -> dict[str, Any]:
        """The counts of the manifest."""
        read = {name: self.parts[f"{name} after read"] for name in ("groups", "trajectories")}
        return {
            "read": read,
            **self.labels.as_counts(),
            "records": self.parts["records"],
            "records_not_asked_for": self.parts["not_asked_for"],
            "trajectories_not_selected": self.parts["not_selected"],
            "responses_with_turns_inside": self.parts["turns_inside"],
            "rejected": dict(sorted(self.rejected.items())),
            "removed": dict(sorted(self.removed.items())),
            "ignored_fields": dict(sorted(self.ignored_fields.items())),
            "judge": {name.removeprefix("judge "): n for name, n in self.parts.items() if name.startswith("judge ")},
            "stages": self.stages(),
        }

    def stages(self) -> list[dict[str, Any]]:
        """Groups and trajectories left after each stage, in order."""
        stages = [
            {"stage": stage, **{name: self.parts[f"{name} after {stage}"] for name in ("groups", "trajectories")}}
            for stage in STAGES
        ]
        left = {name: self.parts[f"{name} after tokenised"] for name in ("groups", "trajectories")}
        for fate, name in FATE_STAGES:
            left["groups"] -= self.fates[fate]
            left["trajectories"] -= self.fate_trajectories[fate]
            stages.append({"stage": name, **left})
        return stages


FATE_STAGES = (
    (SAME_ID, "unique_ids"),
    (SAME_PROBLEM, "unique_problems"),
    (NEAR_PROBLEM, "no_near_duplicates"),
    (TOO_MANY_POSITIVE, "all_positive_limited"),
)


def merged_batches(
    rows: Rows, folder: PartFolder, summary: Summary, lists: dict[str, Path]
) -> Iterator[tuple[Any, list[str]]]:
    """The kept rows in order; what is left out is added to the files and the summary as its part passes."""
    texts = _Problems(rows, folder)
    with ExitStack() as stack:
        files = {name: stack.enter_context(path.open("a", encoding="ascii")) for name, path in lists.items()}
        for part in range(len(rows.first) - 1):
            notes, batch = folder.notes(part), folder.rows(part)
            summary.add_notes(notes)
            span = slice(int(rows.first[part]), int(rows.first[part + 1]))
            records = column(batch, "record", np.int64).tolist()
            out_rejected, out_removed = list(notes.rejected), list(notes.removed)
            for place in np.flatnonzero(rows.fate[span] != KEPT).tolist():
                left_out = _left_out(rows, texts, span.start + place)
                lines = out_rejected if isinstance(left_out, Reject) else out_removed
                lines.append((records[place], asdict(left_out)))
                summary.fates[int(rows.fate[span.start + place])] += 1
                summary.fate_trajectories[int(rows.fate[span.start + place])] += len(batch["rewards"][place])
            summary.rejected.update(_list(out_rejected, files[REJECTED_FILE]))
            summary.removed.update(_list(out_removed, files[REMOVED_FILE]))
            _list(notes.disagreements, files[DISAGREEMENTS_FILE])
            if out_rejected:
                summary.last_reject = str(Reject(**max(out_rejected, key=lambda entry: entry[0])[1]))
            kept = rows.fate[span] == KEPT
            if kept.any():
                yield _stored(batch, kept, rows.validation[span][kept])


def _list(lines: list[tuple[int, dict[str, Any]]], file: TextIO) -> list[str]:
    """Writes the lines in the order of their records; returns their reasons."""
    for _, line in sorted(lines, key=lambda entry: entry[0]):
        # ASCII with escapes: what was got may hold lone surrogates, which UTF-8 cannot.
        file.write(json.dumps(line) + "\n")
    return [line["reason"] for _, line in lines if "reason" in line]


def _stored(batch: Any, kept: BoolArray, validation: BoolArray) -> tuple[Any, list[str]]:
    chosen = batch if kept.all() else batch.filter(pa.array(kept))
    columns = [pa.array(validation) if name == "validation" else chosen[name] for name in SCHEMA.names]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA), chosen["row_fingerprint"].to_pylist()


def _left_out(rows: Rows, texts: _Problems, row: int) -> Reject | Removal:
    where, name = texts.value(row, "origin"), texts.value(row, "group_id")
    fate, partner = int(rows.fate[row]), int(rows.partner[row])
    if fate == TOO_MANY_POSITIVE:
        return Removal(where, name, None, "all-positive share", "more all-positive groups than asked for")
    other = texts.value(partner, "origin")
    if fate == SAME_ID:
        return reject_of(
            where, name, RecordError("duplicated group id", "group_id", expected=f"not that of {other}", got=name)
        )
    if fate == SAME_PROBLEM:
        return Removal(where, name, None, "duplicate problem", "the same normalised text", other)
    detail = f"Jaccard similarity {texts.similarity(row, partner):.2f} with the first of its cluster"
    return Removal(where, name, None, "near-duplicate problem", detail, other)
