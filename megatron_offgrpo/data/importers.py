"""Raw solutions in: one group a record, in one of the known forms, checked field by field."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_offgrpo.data.readers import read_records
from megatron_offgrpo.data.rejects import RecordError, RejectFile
from megatron_offgrpo.errors import DataError
from megatron_offgrpo.types import GroupRecord, TrajectoryRecord

LOGPROB_TOLERANCE = 1e-3
"""Log-probs above 0 by no more than this are the generator's rounding."""


@dataclass(frozen=True)
class Form:
    """The names that a kind of record gives to its fields."""

    group_id: str = "group_id"
    problem: str = "problem"
    answer: str = "answer"
    system: str = "system"
    trajectories: str = "trajectories"
    text: str = "text"
    reward: str = "reward"
    logprobs: str = "logprobs"
    source: str = "source"
    on_policy: str = "on_policy"
    sample_id: str = "sample_id"

    @property
    def group_fields(self) -> tuple[str, ...]:
        return self.group_id, self.problem, self.answer, self.system, self.trajectories

    @property
    def trajectory_fields(self) -> tuple[str, ...]:
        return self.text, self.reward, self.logprobs, self.source, self.on_policy, self.sample_id


FORMS = (Form(), Form(answer="gold", trajectories="solutions", reward="label", source="generator"))
"""A record's form is the first one whose list of trajectories it has."""


def read_groups(
    paths: list[Path],
    rejects: RejectFile,
    ignored_fields: Counter[str],
    *,
    answer_required: bool = True,
    advance: Callable[[float], None] = lambda share: None,
) -> Iterator[GroupRecord]:
    """Streams the valid groups of the files, in order; of groups with one id the first is kept.

    Args:
        rejects: takes every record that is left out.
        ignored_fields: counts the fields that no form knows, by name.
        answer_required: whether a group without a reference answer is rejected.
        advance: called with the number of files (a fraction) read since the last call.

    Raises:
        DataError: a file is missing, unreadable, of unknown extension, or holds no valid record.
    """
    seen: dict[str, str] = {}
    for path in paths:
        num_valid, share_before, rejected_before = 0, 0.0, rejects.counts.total()
        for where, record, share in read_records(path):
            if share > share_before:
                advance(share - share_before)
                share_before = share
            try:
                group = replace(parse_record(record, ignored_fields, answer_required), origin=where)
                if group.group_id in seen:
                    raise RecordError(
                        "duplicated group id",
                        "group_id",
                        expected=f"not that of {seen[group.group_id]}",
                        got=group.group_id,
                    )
            except RecordError as error:
                rejects.add(where, record.get("group_id") if isinstance(record, dict) else None, error)
                continue
            seen[group.group_id] = where
            num_valid += 1
            yield group
        if num_valid == 0:
            num_rejected = rejects.counts.total() - rejected_before
            raise DataError(
                "no valid record in this file",
                where=str(path),
                expected="records with group_id, problem, answer and trajectories: [{text, ...}]",
                got=f"{num_rejected} rejected, the last one {rejects.last}" if num_rejected else "no record",
            )


def parse_record(record: Any, ignored_fields: Counter[str], answer_required: bool = True) -> GroupRecord:
    """The group that a record describes.

    Raises:
        RecordError: a field is missing, of a wrong type, or has an impossible value.
    """
    if isinstance(record, RecordError):
        raise record
    if not isinstance(record, dict):
        raise RecordError("wrong type", "record", expected="an object", got=record)
    form = next((form for form in FORMS if form.trajectories in record), None)
    if form is None:
        names = " or ".join(form.trajectories for form in FORMS)
        raise RecordError("missing field", names, expected="a list of trajectories", got=f"fields {', '.join(record)}")
    raw = record[form.trajectories]
    if not isinstance(raw, list):
        raise RecordError("wrong type", form.trajectories, expected="a list", got=raw)
    if not raw:
        raise RecordError("empty trajectory list", form.trajectories, expected="at least one trajectory", got=raw)
    group = GroupRecord(
        group_id=_name(record, form.group_id),
        problem=_required_text(record, form.problem, "", may_be_blank=False),
        answer=_answer(record, form.answer, answer_required),
        system=_text(record, form.system, ""),
        trajectories=tuple(_trajectory(one, f"{form.trajectories}[{index}]", form) for index, one in enumerate(raw)),
    )
    ignored_fields.update(name for name in record if name not in form.group_fields)
    for one in raw:
        ignored_fields.update(f"{form.trajectories}[].{name}" for name in one if name not in form.trajectory_fields)
    return group


def _trajectory(raw: Any, where: str, form: Form) -> TrajectoryRecord:
    if not isinstance(raw, dict):
        raise RecordError("wrong type", where, expected="an object", got=raw)
    on_policy = raw.get(form.on_policy)
    if not (on_policy is None or isinstance(on_policy, bool)):
        raise RecordError("wrong type", f"{where}.{form.on_policy}", expected="true or false", got=on_policy)
    return TrajectoryRecord(
        text=_required_text(raw, form.text, f"{where}.", may_be_blank=True),
        reward=_reward(raw.get(form.reward), f"{where}.{form.reward}"),
        logprobs=_logprobs(raw.get(form.logprobs), f"{where}.{form.logprobs}"),
        source=_text(raw, form.source, f"{where}."),
        on_policy=bool(on_policy),
        sample_id=_text(raw, form.sample_id, f"{where}."),
    )


def _reward(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise RecordError("unknown reward", where, expected="0, 1, true, false or null", got=value)
    return float(value)


def _logprobs(value: Any, where: str) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise RecordError("wrong type", where, expected="a list of numbers or null", got=value)
    for index, one in enumerate(value):
        if isinstance(one, bool) or not isinstance(one, int | float):
            raise RecordError("wrong type", f"{where}[{index}]", expected="a number", got=one)
        if not math.isfinite(one) or one > LOGPROB_TOLERANCE:
            raise RecordError("impossible log-prob", f"{where}[{index}]", expected="a finite number <= 0", got=one)
    return tuple(float(one) for one in value)


def _name(record: dict[str, Any], field: str) -> str:
    """An identifier; whole numbers are taken as their digits."""
    value = record.get(field)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _required_text(record, field, "", may_be_blank=False)


def _answer(record: dict[str, Any], field: str, required: bool) -> str:
    value = record.get(field)
    if value is None and not required:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    return _required_text(record, field, "", may_be_blank=not required)


def _required_text(record: dict[str, Any], field: str, prefix: str, *, may_be_blank: bool) -> str:
    if field not in record:
        raise RecordError("missing field", prefix + field, expected="a text", got=f"fields {', '.join(record)}")
    value = _text(record, field, prefix)
    if value is None:
        raise RecordError("wrong type", prefix + field, expected="a text", got=None)
    if not may_be_blank and not value.strip():
        raise RecordError("empty field", prefix + field, expected="a text that is not blank", got=value)
    return value


def _text(record: dict[str, Any], field: str, prefix: str) -> str | None:
    value = record.get(field)
    if value is None:
        return None
    if not isinstance(value, str):
        raise RecordError("wrong type", prefix + field, expected="a text", got=value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as cause:
        got = f"a lone surrogate at character {cause.start}"
        raise RecordError("not UTF-8", prefix + field, expected="text that UTF-8 can hold", got=got) from None
    return value
