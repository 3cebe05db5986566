"""Raw solutions to a store: parts of the input are imported, labelled and tokenised on their own, then merged."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from megatron_offgrpo import __version__
from megatron_offgrpo.artifacts import MANIFEST, fingerprint_of, read_manifest
from megatron_offgrpo.config_values import to_dict
from megatron_offgrpo.data.chat import ChatFormat, chat_format
from megatron_offgrpo.data.decontamination import BenchmarkIndex
from megatron_offgrpo.data.grouping import grouped_parts, grouping_counts, grouping_rejects, has_rows
from megatron_offgrpo.data.importers import parse_conditions
from megatron_offgrpo.data.judge import model_of
from megatron_offgrpo.data.merge import Summary, decide, merged_batches, read_rows
from megatron_offgrpo.data.part_files import PartFolder
from megatron_offgrpo.data.part_runner import file_error, needs_signatures, run_parts
from megatron_offgrpo.data.readers import Part
from megatron_offgrpo.data.rejects import Reject
from megatron_offgrpo.data.sources import Source, open_source
from megatron_offgrpo.data.store import TrajectoryStore, tokenizer_fingerprint
from megatron_offgrpo.data.store_writer import LIST_FILES, REJECTED_FILE, write_batches
from megatron_offgrpo.data.summary import listing, summary_lines
from megatron_offgrpo.data.thinking import ThinkTags
from megatron_offgrpo.data.tokenisation import load_tokenizer
from megatron_offgrpo.data_config import LabelMode, PrepareConfig
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.progress import Advance, progress, say

__all__ = ["PrepareConfig", "prepare", "prepare_shard", "summary_lines"]

# Fields that change how or where the work is done, not its result.
_NOT_CONTENT = ("inputs", "tokenizer", "output", "judge", "workers", "overwrite", "force")
# Fields that only the merging reads: the parts of another choice are taken.
_NOT_IN_PARTS = ("validation_share", "duplicate_problems", "near_duplicates", "max_all_positive_share")


def prepare(config: PrepareConfig) -> TrajectoryStore:
    """Makes the store, or opens it where the same inputs and settings have already made it.

    Parts that `prepare_shard` or an interrupted run has finished are taken as they are.

    Raises:
        ConfigError: an impossible setting.
        DataError: an unusable input file or tokenizer, no valid group, or another store or folder at the output.
    """
    request = _Request(config)
    finished = request.finished()
    if finished is not None:
        say(f"prepare: {config.output} is finished and fits its inputs; reused")
        request.clean()
        return finished
    try:
        request.work(None)
        return request.merge()
    except DataError:
        request.clean_wrong_input()
        raise
    except OSError as cause:
        raise file_error(cause, request.folder) from None


def prepare_shard(config: PrepareConfig, shard: tuple[int, int]) -> str:
    """Does the parts whose number modulo N is I, for (I, N); `prepare` takes them. Returns what was done, in a line."""
    index, count = shard
    if not 0 <= index < count:
        raise ConfigError("no such shard", where="--shard", expected="I/N with 0 <= I < N", got=f"{index}/{count}")
    request = _Request(config)
    if request.finished() is not None:
        return f"{config.output} is finished and fits its inputs"
    try:
        new, total = request.work(shard)
    except OSError as cause:
        raise file_error(cause, request.folder) from None
    return f"shard {index}/{count}: {new} new parts, {total} in all; merge with the same command without --shard"


@dataclass
class _Progress:
    """How far the input is read."""

    new: int = 0
    total: int = 0
    share: float = 0.0
    first_parts: list[int] = field(default_factory=list)
    """Number of the first part of each source."""


class _Request:
    """One way of making one store, with the folder of its parts."""

    def __init__(self, config: PrepareConfig) -> None:
        _check(config)
        config = replace(config, judge_model=model_of(config.judge, config.judge_model))
        self.config, self.output = config, Path(config.output)
        self.tokenizer_print = tokenizer_fingerprint(config.tokenizer)
        self.sources = [open_source(name, config.split) for name in config.inputs]
        benchmarks = [open_source(name, config.split).fingerprint for name in config.filters.decontaminate]
        settings = {name: value for name, value in to_dict(config).items() if name not in _NOT_CONTENT}
        self.inputs = {"input": fingerprint_of([source.fingerprint for source in self.sources])}
        made_by = [self.inputs["input"], self.tokenizer_print, benchmarks, __version__, version("math-verify")]
        self.inputs["request"] = fingerprint_of(*made_by, settings)
        self.all_parts = self.output.with_name(self.output.name + ".parts")
        self.folder = PartFolder(self.all_parts / fingerprint_of(*made_by, _part_settings(config, settings)))

    @cached_property
    def chat(self) -> ChatFormat:
        return chat_format(load_tokenizer(Path(self.config.tokenizer)), self.config.chat_template_kwargs)

    def finished(self) -> TrajectoryStore | None:
        """The store at the output if it is what is asked for; None where a new one is to be made."""
        output, config = self.output, self.config
        if not output.exists():
            return None
        if not (output / MANIFEST).is_file():
            if output.is_dir() and not any(output.iterdir()):
                return None
            raise DataError("the output exists and is no store", where=str(output), remedy="choose another --output")
        # Only what stands in the manifest: the tables of an older version are replaced without being opened.
        request = read_manifest(output, "store", remedy="choose another --output").inputs.get("request")
        if config.force:
            return None
        if request == self.inputs["request"]:
            return TrajectoryStore.open(output)
        if config.overwrite:
            return None
        raise DataError(
            "the output holds a store made from other inputs or settings",
            where=str(output),
            expected=f"request {self.inputs['request']}",
            got=f"request {request}",
            remedy="pass --overwrite or choose another --output",
        )

    def work(self, shard: tuple[int, int] | None) -> tuple[int, int]:
        """Does the missing parts, or those of a shard; (newly done, in all)."""
        # What is unusable is said before any work is done.
        for remark in self.chat.remarks:
            say(f"{self.config.tokenizer}: {remark}")
        BenchmarkIndex(self.config.filters.decontaminate, self.config.filters.decontaminate_words)
        self.folder.path.mkdir(parents=True, exist_ok=True)
        known = self.folder.num_parts
        if known is not None and all(self.folder.is_finished(part) for part in range(known) if _is_ours(part, shard)):
            return 0, known
        state = _Progress()
        with progress("prepare (percent of the input)", 100) as advance:
            run_parts(self.config, self.folder, self._missing(shard, state, advance))
        self.folder.set_num_parts(state.total, state.first_parts)
        return state.new, state.total

    def _missing(
        self, shard: tuple[int, int] | None, state: "_Progress", advance: Advance
    ) -> Iterator[tuple[int, Part]]:
        """Reads the whole input; gives the parts that are to be done."""
        for place, source in enumerate(self.sources):
            state.first_parts.append(state.total)
            for part in self._parts(place, source):
                share = 100 * (place + part.share) / len(self.sources)
                if _is_ours(state.total, shard) and not self.folder.is_finished(state.total):
                    state.new += 1
                    yield state.total, part
                advance(share - state.share)
                state.share = share
                state.total += 1

    def _parts(self, place: int, source: Source) -> Iterator[Part]:
        form = self.config.format
        if has_rows(source, form):
            yield from grouped_parts(source, self._grouped(place), parse_conditions(self.config.where), form)
        else:
            yield from source.parts()

    def _grouped(self, place: int) -> Path:
        return self.folder.path / f"grouped-{place}"

    def merge(self) -> TrajectoryStore:
        """The store of all finished parts; their folder is removed."""
        num_parts = self.folder.num_parts
        assert num_parts is not None
        rows = read_rows(self.folder, num_parts)
        decide(rows, self.folder, self.config)
        summary, counts, scratch = Summary(), dict[str, Any](), self.folder.path
        self._check_sources(num_parts)
        lists = {name: scratch / name for name in LIST_FILES}
        for path in lists.values():
            path.write_bytes(b"")
        self._write_grouping_rejects(lists[REJECTED_FILE], summary)

        def batches() -> Iterator[Any]:
            yield from merged_batches(rows, self.folder, summary, lists)
            counts.update(summary.as_counts(), end_of_turn=self.chat.end_text)
            self._check_result(summary, counts)

        write_batches(
            scratch / "store",
            batches(),
            tokenizer_fingerprint=self.tokenizer_print,
            inputs=self.inputs,
            counts=counts,
            config=to_dict(self.config) | {"chat_template_kwargs": dict(self.chat.variables)},
            lists=lists,
        )
        if self.output.exists():
            shutil.rmtree(self.output)
        os.replace(scratch / "store", self.output)
        self.clean()
        return TrajectoryStore.open(self.output)

    def _write_grouping_rejects(self, rejected: Path, summary: Summary) -> None:
        with rejected.open("w", encoding="ascii") as file:
            for place in range(len(self.sources)):
                if not self._grouped(place).is_dir():
                    continue
                for reject in grouping_rejects(self._grouped(place)):
                    file.write(json.dumps(vars(reject)) + "\n")
                    summary.rejected[reject.reason] += 1
                    summary.last_reject = str(reject)
                found = grouping_counts(self._grouped(place))
                summary.parts["rows_grouped"] += found.get("rows", 0)
                summary.parts["not_asked_for"] += found.get("not_asked_for", 0)
                summary.ignored_fields.update(found["ignored_fields"])

    def _check_sources(self, num_parts: int) -> None:
        """Refuses a source without a single readable record."""
        first = [*self.folder.first_parts, num_parts]
        for place, source in enumerate(self.sources):
            notes = [self.folder.notes(part) for part in range(first[place], first[place + 1])]
            if any(one.counts.get("groups after read") or one.counts.get("not_asked_for") for one in notes):
                continue
            rejected = [Reject(**line) for one in notes for _, line in one.rejected]
            if self._grouped(place).is_dir():
                rejected += list(grouping_rejects(self._grouped(place)))
            got = f"{len(rejected)} rejected, the last one {rejected[-1]}" if rejected else "no record"
            raise DataError("no valid record in this file", where=source.name, expected=EXPECTED, got=got)

    def _check_result(self, summary: Summary, counts: dict[str, Any]) -> None:
        if counts["stages"][-1]["groups"]:
            return
        names = ", ".join(self.config.inputs)
        left_out = {"rejected": counts["rejected"], "removed": counts["removed"]}
        listed = "; ".join(f"{name}: {listing(found)}" for name, found in left_out.items() if found)
        last = f"; the last one rejected {summary.last_reject}" if summary.last_reject else ""
        raise DataError("no group is left", where=names, got=f"{listed}{last}")

    def clean(self) -> None:
        """Removes the parts of this request."""
        shutil.rmtree(self.folder.path, ignore_errors=True)
        if self.all_parts.is_dir() and not any(self.all_parts.iterdir()):
            self.all_parts.rmdir()

    def clean_wrong_input(self) -> None:
        """After an error in the input: mended input is another request. A hub that did not answer is asked again."""
        if all(source.kind != "hub" for source in self.sources):
            self.clean()


EXPECTED = "records with group_id, problem, answer and trajectories: [{text, ...}], or another form of docs/data.md"


def _part_settings(config: PrepareConfig, settings: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in settings.items() if name not in (*_NOT_IN_PARTS, "filters", "seed")}
    kept["filters"] = {name: value for name, value in settings["filters"].items() if name not in _NOT_IN_PARTS}
    return {
        **kept,
        "signatures": needs_signatures(config),
        "seed": config.seed if config.select == "random" else None,
    }


def _is_ours(part: int, shard: tuple[int, int] | None) -> bool:
    return shard is None or part % shard[1] == shard[0]


def _check(config: PrepareConfig) -> None:
    ThinkTags(config.think_tags)
    for name in ("inputs", "tokenizer", "output"):
        if not getattr(config, name):
            option = "--input" if name == "inputs" else f"--{name}"
            raise ConfigError("not given", where=option, expected="at least one" if name == "inputs" else "a folder")
    if not config.labels:
        raise ConfigError("no label", where="--label", expected=" or ".join(get_args(LabelMode)))
    for label in config.labels:
        if label not in get_args(LabelMode):
            raise ConfigError("unknown choice", where="--label", expected=" or ".join(get_args(LabelMode)), got=label)
    if config.judge and "math-verify" not in config.labels:
        got = ", ".join(config.labels)
        raise ConfigError("nothing to judge", where="--judge", expected="--label math-verify", got=got)
    filters = config.filters
    if filters.min_pass_rate > filters.max_pass_rate:
        got = f"{filters.min_pass_rate} to {filters.max_pass_rate}"
        raise ConfigError("an empty range", where="--min-pass-rate", expected="at most --max-pass-rate", got=got)
