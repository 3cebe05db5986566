"""Raw records to trajectory groups: one small function for each form, checked field by field."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_offgrpo.artifacts import fingerprint_of
from megatron_offgrpo.data import fields
from megatron_offgrpo.data.rejects import RecordError
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.types import GroupRecord, TrajectoryRecord


@dataclass(frozen=True)
class Names:
    """The names that a kind of record with a list of trajectories gives to its fields."""

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
    finish_reason: str = "finish_reason"

    @property
    def group_fields(self) -> tuple[str, ...]:
        return self.group_id, self.problem, self.answer, self.system, self.trajectories

    @property
    def trajectory_fields(self) -> tuple[str, ...]:
        own = (self.text, self.reward, self.logprobs, self.source, self.on_policy)
        return *own, self.sample_id, self.finish_reason


OURS = Names()
SOLUTIONS = Names(answer="gold", trajectories="solutions", reward="label", source="generator")


def named_group(record: dict[str, Any], names: Names, ignored: Counter[str], answer_required: bool) -> GroupRecord:
    """A record with a list of trajectories: our own groups, and `gold`/`solutions`/`label`."""
    found = record.get(names.trajectories)
    if names.trajectories not in record:
        got = f"fields {', '.join(record)}"
        raise RecordError("missing field", names.trajectories, expected="a list of trajectories", got=got)
    raw = fields.non_empty_list(found, names.trajectories, "trajectories")
    group = GroupRecord(
        group_id=fields.identifier(record, names.group_id),
        problem=fields.required_text(record, names.problem, "", may_be_blank=False),
        answer=fields.answer(record, names.answer, "", required=answer_required),
        system=fields.text(record, names.system, ""),
        trajectories=tuple(_trajectory(one, f"{names.trajectories}[{index}]", names) for index, one in enumerate(raw)),
    )
    ignored.update(name for name in record if name not in names.group_fields)
    for one in raw:
        ignored.update(f"{names.trajectories}[].{name}" for name in one if name not in names.trajectory_fields)
    return group


def _trajectory(raw: Any, where: str, names: Names) -> TrajectoryRecord:
    fields.mapping(raw, where)
    on_policy = raw.get(names.on_policy)
    if not (on_policy is None or isinstance(on_policy, bool)):
        raise RecordError("wrong type", f"{where}.{names.on_policy}", expected="true or false", got=on_policy)
    return TrajectoryRecord(
        text=fields.required_text(raw, names.text, f"{where}.", may_be_blank=True),
        reward=fields.reward(raw.get(names.reward), f"{where}.{names.reward}"),
        logprobs=fields.logprobs(raw.get(names.logprobs), f"{where}.{names.logprobs}"),
        source=fields.text(raw, names.source, f"{where}."),
        on_policy=bool(on_policy),
        sample_id=fields.text(raw, names.sample_id, f"{where}."),
        finish_reason=fields.text(raw, names.finish_reason, f"{where}."),
    )


VERL_FIELDS = ("prompt", "target", "target_lst", "target_rewards", "reward_model", "extra_info", "data_source")


def verl_group(record: dict[str, Any], ignored: Counter[str], answer_required: bool) -> GroupRecord:
    """verl's row with off-policy targets, as LUFFY and KRAFTON's offline GRPO train on.

    `prompt` is a list of messages; `target_lst` (or a single `target`) holds the solutions, each a text, a message or a
    list of messages; `target_rewards` their rewards; `reward_model.ground_truth` the reference answer.
    """
    system, problem = _question(record.get("prompt"), "prompt", "role", "content")
    single = record.get("target_lst") is None
    name = "target" if single else "target_lst"
    value = record.get(name)
    raw = [value] if single and value is not None else fields.non_empty_list(value, name, "trajectories")
    rewards = record.get("target_rewards")
    if rewards is not None and (not isinstance(rewards, list) or len(rewards) != len(raw)):
        expected = f"a list of {len(raw)}, one for each of {name}"
        raise RecordError("wrong number of rewards", "target_rewards", expected=expected, got=rewards)
    texts = [_target(one, name if single else f"{name}[{index}]") for index, one in enumerate(raw)]
    judged = rewards or [None] * len(raw)
    info = record.get("extra_info") if isinstance(record.get("extra_info"), dict) else {}
    model = record.get("reward_model") if isinstance(record.get("reward_model"), dict) else {}
    assert info is not None
    assert model is not None
    ignored.update(name for name in record if name not in VERL_FIELDS)
    return GroupRecord(
        group_id=_verl_id(record, info, system, problem),
        problem=problem,
        answer=fields.answer(model, "ground_truth", "reward_model.", required=answer_required),
        system=system,
        trajectories=tuple(
            TrajectoryRecord(text, fields.reward(one, f"target_rewards[{index}]"))
            for index, (text, one) in enumerate(zip(texts, judged, strict=True))
        ),
    )


def _verl_id(record: dict[str, Any], info: dict[str, Any], system: str | None, problem: str) -> str:
    """`extra_info.group_id` (our export), else source, split and index, else the hash of the prompt."""
    if info.get("group_id") is not None:
        return fields.identifier(info, "group_id")
    if info.get("index") is not None:
        parts = (record.get("data_source"), info.get("split"), fields.identifier(info, "index"))
        return "-".join(fields.checked_text(part, "data_source") for part in parts if part is not None)
    return fingerprint_of(system, problem)


def _target(value: Any, where: str) -> str:
    if isinstance(value, list) and len(value) == 1:
        value, where = value[0], f"{where}[0]"
    if isinstance(value, dict):
        return fields.required_text(value, "content", f"{where}.", may_be_blank=True)
    if isinstance(value, list):
        raise RecordError("not one answer", where, expected="a text or one message", got=f"{len(value)} messages")
    return fields.checked_text(value, where)


def _question(value: Any, where: str, role: str, content: str) -> tuple[str | None, str]:
    """(system text or None, the one question) of a list of messages without an answer."""
    messages = fields.non_empty_list(value, where, "messages")
    texts: dict[str, list[str]] = {"system": [], "user": []}
    for index, message in enumerate(messages):
        place = f"{where}[{index}]"
        who = fields.mapping(message, place).get(role)
        name = {"human": "user"}.get(str(who), str(who))
        if name not in texts:
            raise RecordError("unknown role", f"{place}.{role}", expected="system or user", got=who)
        texts[name].append(fields.required_text(message, content, f"{place}.", may_be_blank=name == "system"))
    if len(texts["user"]) != 1 or len(texts["system"]) > 1:
        got = f"{len(texts['system'])} system and {len(texts['user'])} user messages"
        raise RecordError("not one question", where, expected="one question, at most one system text", got=got)
    return (texts["system"][0] if texts["system"] else None), texts["user"][0]


OPENR1_FIELDS = ("problem", "answer", "uuid", "generations", "correctness_math_verify")


def openr1_group(record: dict[str, Any], ignored: Counter[str], answer_required: bool) -> GroupRecord:
    """OpenR1-Math's row: `generations` of one `problem`, with math-verify's verdicts where it has them."""
    raw = fields.non_empty_list(record.get("generations"), "generations", "trajectories")
    verdicts = record.get("correctness_math_verify") or [None] * len(raw)
    if not isinstance(verdicts, list) or len(verdicts) != len(raw):
        expected = f"a list of {len(raw)}, one for each of generations"
        raise RecordError("wrong number of rewards", "correctness_math_verify", expected=expected, got=verdicts)
    ignored.update(name for name in record if name not in OPENR1_FIELDS)
    problem = fields.required_text(record, "problem", "", may_be_blank=False)
    return GroupRecord(
        group_id=fields.identifier(record, "uuid") if record.get("uuid") is not None else fingerprint_of(problem),
        problem=problem,
        answer=fields.answer(record, "answer", "", required=answer_required),
        trajectories=tuple(
            TrajectoryRecord(
                fields.checked_text(text, f"generations[{index}]"),
                fields.reward(verdict, f"correctness_math_verify[{index}]"),
            )
            for index, (text, verdict) in enumerate(zip(raw, verdicts, strict=True))
        ),
    )


def sharegpt_row(record: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(key of the problem, row of our own form with one trajectory) of a conversation of one question and one answer.

    The key is `metadata.hash_problem` where there is one, else the hash of system text and question.
    """
    turns = fields.non_empty_list(record.get("conversations"), "conversations", "messages")
    last = fields.mapping(turns[-1], f"conversations[{len(turns) - 1}]")
    if last.get("from") not in ("gpt", "assistant"):
        where = f"conversations[{len(turns) - 1}].from"
        raise RecordError("no answer", where, expected="gpt or assistant", got=last.get("from"))
    system, problem = _question(turns[:-1], "conversations", "from", "value")
    text = fields.required_text(last, "value", f"conversations[{len(turns) - 1}].", may_be_blank=True)
    metadata = record.get("metadata") if isinstance(record.get("metadata"), dict) else {}
    assert metadata is not None
    named = metadata.get("hash_problem") is not None
    key = fields.identifier(metadata, "hash_problem") if named else fingerprint_of(system, problem)
    answers = (one.get(name) for one in (record, metadata) for name in ("answer", "ground_truth", "expected_answer"))
    answer = next((one for one in answers if one is not None), None)
    return key, {
        "group_id": key,
        "problem": problem,
        "answer": fields.answer({"answer": answer}, "answer", "", required=False),
        "system": system,
        "trajectories": [{"text": text, "source": fields.text(metadata, "model", "metadata.")}],
    }


Importer = Callable[[dict[str, Any], Counter[str], bool], GroupRecord]
FORMS: dict[str, tuple[tuple[str, ...], Importer]] = {
    "groups": (("trajectories",), lambda record, *rest: named_group(record, OURS, *rest)),
    "solutions": (("solutions",), lambda record, *rest: named_group(record, SOLUTIONS, *rest)),
    "verl": (("target_lst", "target"), verl_group),
    "openr1": (("generations",), openr1_group),
}
"""Name -> (fields of which one tells the form, importer). ShareGPT rows are grouped first; see `grouping`."""


def parse_record(
    record: Any, ignored: Counter[str], *, form: str = "auto", answer_required: bool = True
) -> GroupRecord:
    """The group that a record describes.

    Args:
        ignored: counts the fields that the form does not know.

    Raises:
        RecordError: a field is missing, of a wrong type, or has an impossible value.
    """
    if isinstance(record, RecordError):
        raise record
    if not isinstance(record, dict):
        raise RecordError("wrong type", "record", expected="an object", got=record)
    if form == "auto":
        form = next((name for name, (tells, _) in FORMS.items() if any(one in record for one in tells)), "")
    if form not in FORMS:
        names = " or ".join(tells[0] for tells, _ in FORMS.values())
        raise RecordError("missing field", names, expected="a list of trajectories", got=f"fields {', '.join(record)}")
    return FORMS[form][1](record, ignored, answer_required)


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
