"""Raw records to trajectory groups: one small function for each form, checked field by field."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_offgrpo.artifacts import fingerprint_of
from megatron_offgrpo.data import fields
from megatron_offgrpo.data.messages import (
    SYSTEM_FIELDS,
    THOUGHT_FIELDS,
    question,
    read_messages,
    single_answer,
    solution_text,
    system_of,
)
from megatron_offgrpo.data.rejects import RecordError
from megatron_offgrpo.data.row_forms import ROW_FORMS, pair_group, row_form
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.types import GroupRecord, TrajectoryRecord


@dataclass(frozen=True)
class Names:
    """The names that a kind of record with a list of trajectories gives to its fields."""

    answer: str = "answer"
    trajectories: str = "trajectories"
    reward: str = "reward"
    source: str = "source"

    @property
    def group_fields(self) -> tuple[str, ...]:
        return "group_id", "problem", self.answer, self.trajectories, *SYSTEM_FIELDS

    @property
    def trajectory_fields(self) -> tuple[str, ...]:
        own = ("text", self.reward, "logprobs", self.source, "on_policy", "sample_id", "finish_reason")
        return *own, *THOUGHT_FIELDS


OURS = Names()
SOLUTIONS = Names(answer="gold", trajectories="solutions", reward="label", source="generator")


def named_group(record: dict[str, Any], names: Names, ignored: Counter[str], answer_required: bool) -> GroupRecord:
    """A record with a list of trajectories: our own groups, and `gold`/`solutions`/`label`."""
    if names.trajectories not in record:
        got = f"fields {', '.join(record)}"
        raise RecordError("missing field", names.trajectories, expected="a list of trajectories", got=got)
    raw = fields.non_empty_list(record[names.trajectories], names.trajectories, "trajectories")
    group = GroupRecord(
        group_id=fields.identifier(record, "group_id"),
        problem=fields.required_text(record, "problem", "", may_be_blank=False),
        answer=fields.reference(record, names.answer, "", required=answer_required),
        system=system_of(record),
        trajectories=tuple(
            _trajectory(one, f"{names.trajectories}[{index}]", names, ignored) for index, one in enumerate(raw)
        ),
    )
    fields.account(record, names.group_fields, "", ignored)
    return group


def _trajectory(value: Any, where: str, names: Names, ignored: Counter[str]) -> TrajectoryRecord:
    raw = fields.mapping(value, where)
    on_policy = raw.get("on_policy")
    if not (on_policy is None or isinstance(on_policy, bool)):
        raise RecordError("wrong type", f"{where}.on_policy", expected="true or false", got=on_policy)
    logprobs = fields.logprobs(raw.get("logprobs"), f"{where}.logprobs")
    thought = next((name for name in THOUGHT_FIELDS if raw.get(name)), None)
    if logprobs is not None and thought is not None:
        expected = "none beside log-probs, which stand for the tokens of `text`"
        raise RecordError("field without a use", f"{where}.{thought}", expected=expected, got=raw[thought])
    trajectory = TrajectoryRecord(
        text=solution_text(raw, "text", f"{where}."),
        reward=fields.reward(raw.get(names.reward), f"{where}.{names.reward}"),
        logprobs=logprobs,
        source=fields.text(raw, names.source, f"{where}."),
        on_policy=bool(on_policy),
        sample_id=fields.text(raw, "sample_id", f"{where}."),
        finish_reason=fields.finish_reason(raw.get("finish_reason"), f"{where}.finish_reason"),
    )
    fields.account(raw, names.trajectory_fields, f"{where}.", ignored)
    return trajectory


VERL_FIELDS = (
    "prompt", "target", "target_lst", "target_rewards", "target_info", "reward_model", "extra_info", "data_source",
    *SYSTEM_FIELDS,
)  # fmt: skip


def verl_group(record: dict[str, Any], ignored: Counter[str], answer_required: bool) -> GroupRecord:
    """verl's row with off-policy targets, as LUFFY and KRAFTON's offline GRPO train on.

    `prompt` is a list of messages; `target_lst` (or a single `target`) holds the solutions, each a text, a message or a
    list with one message; `target_rewards` their rewards; `reward_model.ground_truth` the reference answer. Lists and
    objects may stand as JSON text. `target_info` is what `offgrpo export` knows of each solution beside its text.
    """
    system, problem = question(read_messages(record.get("prompt"), "prompt", ignored), "prompt")
    system = system_of(record, system)
    single = record.get("target_lst") is None
    name = "target" if single else "target_lst"
    value = record.get(name)
    raw = [value] if single and value is not None else fields.non_empty_list(value, name, "trajectories")
    rewards = fields.one_each(record, "target_rewards", "rewards", len(raw))
    infos = fields.one_each(record, "target_info", "entries", len(raw))
    trajectories = []
    for index, (value, reward, known) in enumerate(zip(raw, rewards, infos, strict=True)):
        answer = single_answer(value, name if single else f"{name}[{index}]", ignored)
        where = f"target_info[{index}]"
        facts = {} if known is None else fields.mapping(known, where)
        one = _trajectory(facts | {"text": answer.text}, where, OURS, ignored)
        given = fields.reward(reward, f"target_rewards[{index}]")
        trajectories.append(replace(one, reward=given, finish_reason=one.finish_reason or answer.finish_reason))
    info, model = (fields.optional_mapping(record, name) for name in ("extra_info", "reward_model"))
    fields.account(record, VERL_FIELDS, "", ignored)
    fields.account(info, ("group_id", "index", "split"), "extra_info.", ignored)
    fields.account(model, ("ground_truth", "style"), "reward_model.", ignored)
    return GroupRecord(
        group_id=_verl_id(record, info, system, problem),
        problem=problem,
        answer=fields.reference(model, "ground_truth", "reward_model.", required=answer_required),
        system=system,
        trajectories=tuple(trajectories),
    )


def _verl_id(record: dict[str, Any], info: dict[str, Any], system: str | None, problem: str) -> str:
    """`extra_info.group_id` (our export), else source, split and index, else the hash of the prompt."""
    if info.get("group_id") is not None:
        return fields.identifier(info, "group_id")
    if info.get("index") is not None:
        parts = (record.get("data_source"), info.get("split"), fields.identifier(info, "index"))
        return "-".join(fields.checked_text(part, "data_source") for part in parts if part is not None)
    return fingerprint_of(system, problem)


OPENR1_FIELDS = (
    "problem", "answer", "uuid", "generations", "correctness_math_verify", "finish_reasons", *SYSTEM_FIELDS,
)  # fmt: skip


def openr1_group(record: dict[str, Any], ignored: Counter[str], answer_required: bool) -> GroupRecord:
    """OpenR1-Math's row: `generations` of one `problem`, with math-verify's verdicts where it has them."""
    raw = fields.non_empty_list(record.get("generations"), "generations", "trajectories")
    verdicts = fields.one_each(record, "correctness_math_verify", "rewards", len(raw))
    reasons = fields.one_each(record, "finish_reasons", "finish reasons", len(raw))
    problem, system = fields.required_text(record, "problem", "", may_be_blank=False), system_of(record)
    answers = [single_answer(one, f"generations[{index}]", ignored) for index, one in enumerate(raw)]
    fields.account(record, OPENR1_FIELDS, "", ignored)
    named = record.get("uuid") is not None
    return GroupRecord(
        group_id=fields.identifier(record, "uuid") if named else fingerprint_of(*([system] if system else []), problem),
        problem=problem,
        answer=fields.reference(record, "answer", "", required=answer_required),
        system=system,
        trajectories=tuple(
            TrajectoryRecord(
                answer.text,
                fields.reward(verdict, f"correctness_math_verify[{index}]"),
                finish_reason=fields.finish_reason(reason, f"finish_reasons[{index}]") or answer.finish_reason,
            )
            for index, (answer, verdict, reason) in enumerate(zip(answers, verdicts, reasons, strict=True))
        ),
    )


Importer = Callable[[dict[str, Any], Counter[str], bool], GroupRecord]
FORMS: dict[str, tuple[tuple[str, ...], Importer]] = {
    "groups": (("trajectories",), lambda record, *rest: named_group(record, OURS, *rest)),
    "solutions": (("solutions",), lambda record, *rest: named_group(record, SOLUTIONS, *rest)),
    "verl": (("target_lst", "target"), verl_group),
    "openr1": (("generations",), openr1_group),
    "preference": (("chosen", "rejected"), pair_group),
}
"""Name -> (fields of which one tells the form, importer). Rows of one solution are grouped first; see `grouping`."""


def form_of(record: dict[str, Any]) -> str | None:
    """The form that a record has, one of `FORMS` or `ROW_FORMS`; None where no field tells one."""
    told = (name for name, (tells, _) in FORMS.items() if any(record.get(one) is not None for one in tells))
    return next(told, None) or row_form(record)


def parse_record(
    record: Any, ignored: Counter[str], *, form: str = "auto", answer_required: bool = True
) -> GroupRecord:
    """The group that a record describes.

    Args:
        ignored: counts the fields that the form does not use.

    Raises:
        RecordError: a field is missing, of a wrong type, has an impossible value, or would change the meaning and has
            no use in this form.
    """
    if isinstance(record, RecordError):
        raise record
    if not isinstance(record, dict):
        raise RecordError("wrong type", "record", expected="an object", got=record)
    found = form_of(record) if form == "auto" else form
    if found not in FORMS:
        known = [*(tells[0] for tells, _ in FORMS.values()), *(" and ".join(tells) for tells, _ in ROW_FORMS.values())]
        expected = f"the fields of one form: {', or '.join(known)}"
        if found is not None:
            expected = "groups, as in the records before; rows of one solution need a file of their own"
        raise RecordError("unknown form", "record", expected=expected, got=f"fields {', '.join(record)}")
    counted = Counter[str]()
    group = FORMS[found][1](record, counted, answer_required)
    ignored.update(counted)
    return group


def parse_conditions(conditions: Sequence[str]) -> list[tuple[list[str], str]]:
    """(path, value) of each `field=value`.

    Raises:
        ConfigError: no equals sign.
    """
    parsed = []
    for condition in conditions:
        path, equals, value = condition.partition("=")
        if not equals or not path:
            raise ConfigError("not a condition", where="--where", expected="field=value", got=condition)
        parsed.append((path.split("."), value))
    return parsed


def meets(record: Any, conditions: list[tuple[list[str], str]]) -> bool:
    """Whether the record has these values; what is no object is left to the importer to refuse."""
    if not isinstance(record, dict):
        return True
    for path, value in conditions:
        found: Any = record
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        if found is None or str(found) != value:
            return False
    return True
