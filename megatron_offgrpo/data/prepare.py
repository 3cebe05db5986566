"""Raw solutions to a store: import, label, select, tokenise, write."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from megatron_offgrpo import __version__
from megatron_offgrpo.artifacts import MANIFEST, fingerprint_of, fingerprint_of_file
from megatron_offgrpo.config import to_dict
from megatron_offgrpo.data.grading import GradingPool
from megatron_offgrpo.data.importers import read_groups
from megatron_offgrpo.data.labelling import (
    DISAGREEMENTS,
    LabelCounts,
    LabelledGroup,
    LabelMode,
    label_by_given,
    label_by_majority,
    label_by_math_verify,
)
from megatron_offgrpo.data.rejects import RecordError, RejectFile
from megatron_offgrpo.data.selection import released_order
from megatron_offgrpo.data.store import REJECTED_FILE, StoreRow, TrajectoryStore, tokenizer_fingerprint, write_store
from megatron_offgrpo.data.tokenisation import Limits, load_tokenizer, tokenise
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.progress import progress, say
from megatron_offgrpo.types import GroupRecord

GROUPS_PER_BLOCK = 256


@dataclass(frozen=True)
class PrepareConfig:
    """What `offgrpo prepare` does."""

    inputs: tuple[str, ...]
    """JSON-lines (.jsonl, .jsonl.gz) or Parquet files, read in this order."""
    tokenizer: str
    """Hugging Face folder of the student; its tokenizer and chat template are used."""
    output: str
    """Folder of the store."""
    label: LabelMode = "math-verify"
    trajectories_per_group: int = 8
    """K; longer groups are cut to K in the released order, shorter ones stay short."""
    max_prompt_tokens: int = 1024
    """Groups with a longer prompt are rejected."""
    max_response_tokens: int = 31744
    """Longer responses are cut; they keep their reward and have no EOS."""
    grading_timeout_seconds: float = 5.0
    """CPU seconds for one solution."""
    processes: int | None = None
    """Grading processes; None takes one for each CPU this process may use."""
    overwrite: bool = False
    """Replace a store that was made from other inputs or settings."""
    force: bool = False
    """Make the store again even if it is finished and fits."""


# Fields that change how or where the work is done, not its result.
_NOT_CONTENT = ("inputs", "tokenizer", "output", "processes", "overwrite", "force")


@dataclass
class _Counts:
    ignored_fields: Counter[str] = field(default_factory=Counter)
    labels: LabelCounts = field(default_factory=LabelCounts)
    groups_read: int = 0
    groups_stored: int = 0
    trajectories_read: int = 0
    trajectories_not_selected: int = 0


def prepare(config: PrepareConfig) -> TrajectoryStore:
    """Makes the store, or opens it where the same inputs and settings have already made it.

    Raises:
        ConfigError: an impossible setting.
        DataError: an unusable input file or tokenizer, no valid group, or another store or folder at the output.
    """
    _check(config)
    paths, output, tokenizer_dir = [Path(path) for path in config.inputs], Path(config.output), Path(config.tokenizer)
    tokenizer_print = tokenizer_fingerprint(tokenizer_dir)
    inputs = {"input": fingerprint_of([_fingerprint_of_input(path) for path in paths])}
    settings = {name: value for name, value in to_dict(config).items() if name not in _NOT_CONTENT}
    inputs["request"] = fingerprint_of(inputs, tokenizer_print, settings, __version__, version("math-verify"))
    finished = _finished(output, inputs["request"], config)
    if finished is not None:
        say(f"prepare: {output} is finished and fits its inputs; reused")
        return finished

    tokenizer = load_tokenizer(tokenizer_dir)
    with tempfile.TemporaryDirectory() as scratch:
        rejects, counts, found = RejectFile(Path(scratch) / REJECTED_FILE), _Counts(), dict[str, Any]()

        def rows() -> Iterator[StoreRow]:
            yield from _rows(config, paths, tokenizer, rejects, counts)
            found.update(_final_counts(counts, rejects))
            if rejects.last is not None and counts.groups_stored == 0:
                raise DataError(
                    "every group was rejected",
                    where=", ".join(config.inputs),
                    got=f"rejected: {_listed(found['rejected'])}; the last one {rejects.last}",
                )

        return write_store(
            output,
            rows(),
            tokenizer_fingerprint=tokenizer_print,
            inputs=inputs,
            counts=found,
            config=to_dict(config),
            rejected=rejects.path,
        )


def _rows(
    config: PrepareConfig, paths: list[Path], tokenizer: Any, rejects: RejectFile, counts: _Counts
) -> Iterator[StoreRow]:
    limits = Limits(config.max_prompt_tokens, config.max_response_tokens)
    with (
        progress("prepare (percent of the input)", 100) as advance,
        GradingPool(config.processes, config.grading_timeout_seconds) as pool,
    ):
        groups = read_groups(
            paths,
            rejects,
            counts.ignored_fields,
            answer_required=config.label == "math-verify",
            advance=lambda files: advance(100 * files / len(paths)),
        )
        while block := list(islice(groups, GROUPS_PER_BLOCK)):
            counts.groups_read += len(block)
            counts.trajectories_read += sum(len(group.trajectories) for group in block)
            selected = []
            for labelled in _label(block, config.label, pool, rejects):
                counts.labels.add(labelled)
                selected.append(_select(labelled, config.trajectories_per_group))
                counts.trajectories_not_selected += len(labelled.rewards) - len(selected[-1].rewards)
            for one, row in zip(selected, tokenise(selected, tokenizer, limits), strict=True):
                if isinstance(row, RecordError):
                    rejects.add(one.group.origin, one.group.group_id, row)
                else:
                    counts.groups_stored += 1
                    yield row


def _label(block: list[GroupRecord], mode: LabelMode, pool: GradingPool, rejects: RejectFile) -> list[LabelledGroup]:
    if mode == "math-verify":
        return label_by_math_verify(block, pool)
    if mode == "majority":
        return label_by_majority(block, pool)
    labelled = []
    for group in block:
        try:
            labelled.append(label_by_given(group))
        except RecordError as error:
            rejects.add(group.origin, group.group_id, error)
    return labelled


def _select(labelled: LabelledGroup, num_kept: int) -> LabelledGroup:
    kept = released_order(labelled.rewards, num_kept)
    return LabelledGroup(
        group=replace(labelled.group, trajectories=tuple(labelled.group.trajectories[index] for index in kept)),
        rewards=tuple(labelled.rewards[index] for index in kept),
        statuses=tuple(labelled.statuses[index] for index in kept),
    )


def _final_counts(counts: _Counts, rejects: RejectFile) -> dict[str, Any]:
    return {
        "read": {"groups": counts.groups_read, "trajectories": counts.trajectories_read},
        **counts.labels.as_counts(),
        "trajectories_not_selected": counts.trajectories_not_selected,
        "rejected": dict(sorted(rejects.counts.items())),
        "ignored_fields": dict(sorted(counts.ignored_fields.items())),
    }


def _check(config: PrepareConfig) -> None:
    if not config.inputs:
        raise ConfigError("no input file", where="--input", expected="at least one file")
    if config.label not in get_args(LabelMode):
        raise ConfigError("unknown label", where="--label", expected=" or ".join(get_args(LabelMode)), got=config.label)
    for name in ("trajectories_per_group", "max_prompt_tokens", "max_response_tokens", "grading_timeout_seconds"):
        if getattr(config, name) <= 0:
            raise ConfigError(
                "not positive", where=f"--{name.replace('_', '-')}", expected="more than 0", got=getattr(config, name)
            )


def _fingerprint_of_input(path: Path) -> str:
    try:
        return fingerprint_of_file(path)
    except OSError as cause:
        raise DataError(f"cannot read the input file ({cause.strerror or cause})", where=str(path)) from None


def _finished(output: Path, request: str, config: PrepareConfig) -> TrajectoryStore | None:
    """The store at `output` if it is what is asked for; None where a new one is to be made."""
    if not output.exists():
        return None
    if not (output / MANIFEST).is_file():
        if output.is_dir() and not any(output.iterdir()):
            return None
        raise DataError("the output exists and is no store", where=str(output), remedy="choose another --output")
    store = TrajectoryStore.open(output)
    if config.force:
        return None
    if store.manifest.inputs.get("request") == request:
        return store
    if config.overwrite:
        return None
    raise DataError(
        "the output holds a store made from other inputs or settings",
        where=str(output),
        expected=f"request {request}",
        got=f"request {store.manifest.inputs.get('request')}",
        remedy="pass --overwrite or choose another --output",
    )


def summary_lines(store: TrajectoryStore) -> list[str]:
    """What a person wants to know of a store, for the terminal."""
    counts = store.manifest.counts
    groups = counts["groups"]
    lines = [
        f"store      {store.path} (fingerprint {store.manifest.fingerprint})",
        f"groups     {groups['total']}: {groups['all_positive']} all positive, {groups['mixed']} mixed, "
        f"{groups['all_negative']} all negative",
        f"solutions  {counts['trajectories']} ({counts['trajectories_not_selected']} more were not selected), "
        f"{counts['truncated']} truncated",
        f"tokens     {counts['prompt_tokens']} in prompts, {counts['response_tokens']} in responses",
        "labels     " + _listed(counts["labels"]),
    ]
    agreement = counts["agreement"]
    if agreement["compared"]:
        share = 100 * agreement["agree"] / agreement["compared"]
        differing = ", ".join(f"{agreement[name]} {name.replace('_', ' ')}" for name in DISAGREEMENTS)
        lines.append(
            f"agreement  {agreement['agree']} of {agreement['compared']} given labels ({share:.2f} %); {differing}"
        )
    if counts["rejected"]:
        lines.append(f"rejected   {_listed(counts['rejected'])} (see {store.path / REJECTED_FILE})")
    if counts["ignored_fields"]:
        lines.append("ignored    fields " + _listed(counts["ignored_fields"]))
    return lines


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
