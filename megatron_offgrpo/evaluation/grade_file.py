"""`offgrpo grade`: scores solutions that were made elsewhere, a record each."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from megatron_offgrpo.data import fields
from megatron_offgrpo.data.grading import GradingPool
from megatron_offgrpo.data.judge import Judge, judge_line, log_beside, model_of
from megatron_offgrpo.data.messages import THOUGHT_FIELDS, answer_text
from megatron_offgrpo.data.option_columns import option_columns
from megatron_offgrpo.data.readers import read_parts
from megatron_offgrpo.data.rejects import RecordError, Reject, reject_of
from megatron_offgrpo.data.summary import listing
from megatron_offgrpo.data_config import THINK_TAGS
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.evaluation.grading import Solution, score
from megatron_offgrpo.evaluation.json_lines import json_line
from megatron_offgrpo.evaluation.options import options_and_letter
from megatron_offgrpo.progress import Advance, progress, say

FORM = "records with group_id, sample_id, problem, answer and text"
OPENED = "prompt_opens_thinking"
USED = ("group_id", "sample_id", "problem", "answer", "text", "choices", "options", OPENED, *THOUGHT_FIELDS)


@dataclass
class GradeCounts:
    """What a file gave."""

    graded: int = 0
    lenient: int = 0
    strict: int = 0
    rejected: int = 0
    rejects: Path | None = None
    """Where the rejected records are listed; None without any."""
    unused: Counter[str] = field(default_factory=Counter)
    """Fields that stand in the output as they came and have no part in the grading."""


def grade_file(
    source: Path,
    output: Path,
    *,
    processes: int | None = None,
    seconds: float = 5.0,
    think_tags: Sequence[str] = THINK_TAGS,
    prompt_opens_thinking: bool = False,
    judge_url: str | None = None,
    judge_model: str | None = None,
) -> GradeCounts:
    """Writes each record of `source` with `strict`, `lenient`, `extracted` and `reason`, in order, streaming.

    Records that cannot be graded are listed in `OUTPUT.rejects.jsonl`, as `prepare` lists its own. The output is the
    same for any number of processes.

    Args:
        think_tags: see `ThinkTags`.
        prompt_opens_thinking: what holds of lines without a field of this name: their prompt ended inside a thought.

    Raises:
        DataError: the input cannot be read, or none of its records can be graded.
        ConfigError: input and output are one file.
    """
    if source.absolute() == output.absolute():
        raise ConfigError("input and output are one file", where=str(output))
    rejects = output.with_name(output.name + ".rejects.jsonl")
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in (output, rejects)}
    counts = GradeCounts()
    model = model_of(judge_url, judge_model)
    judge = Judge(judge_url, model, log_beside(output)) if judge_url and model else None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with (
            temporary[output].open("w", encoding="utf-8") as graded,
            temporary[rejects].open("w", encoding="ascii") as rejected,
            GradingPool(processes, seconds, think_tags=think_tags) as pool,
            progress(f"grading {source.name} (percent)", 100) as advance,
        ):
            pending: list[dict[str, Any]] = []
            for scored in score(
                _solutions(source, pending, rejected, counts, advance, prompt_opens_thinking), pool, judge
            ):
                record = pending.pop(0) | {
                    "strict": scored.strict,
                    "lenient": scored.lenient,
                    "extracted": scored.extracted,
                    "reason": scored.reason,
                }
                graded.write(json_line(record))
                counts.graded, counts.lenient, counts.strict = (
                    counts.graded + 1,
                    counts.lenient + scored.lenient,
                    counts.strict + scored.strict,
                )
        if not counts.graded:
            raise DataError(
                "no record can be graded", where=str(source), expected=FORM, got=_last_reason(temporary[rejects])
            )
        _publish(counts, temporary, output, rejects)
    except OSError as cause:
        raise DataError(
            f"cannot read or write ({cause.strerror or cause})", where=str(cause.filename or source)
        ) from None
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    if judge is not None:
        say(f"{judge_line(judge.counts)}; see {judge.log}")
    return counts


def _solutions(
    source: Path,
    pending: list[dict[str, Any]],
    rejected: TextIO,
    counts: GradeCounts,
    advance: Advance,
    opened: bool,
) -> Iterator[Solution]:
    """What is to be graded, in order; its record goes to `pending`, what cannot be graded to `rejected`."""
    done = 0.0
    for part in read_parts(source):
        for where, record in part.records():
            try:
                solution = _solution(record, counts.unused, opened)
            except RecordError as error:
                name = record.get("group_id") if isinstance(record, dict) else None
                rejected.write(json.dumps(asdict(reject_of(where, name, error))) + "\n")
                counts.rejected += 1
                continue
            pending.append(record)
            yield solution
        advance(100 * (part.share - done))
        done = part.share


def _publish(counts: GradeCounts, temporary: dict[Path, Path], output: Path, rejects: Path) -> None:
    rejects.unlink(missing_ok=True)  # of an earlier run
    if counts.rejected:
        os.replace(temporary[rejects], rejects)
        counts.rejects = rejects
        say(f"{counts.rejected} record(s) left out, listed in {rejects}")
    if counts.unused:
        say(f"fields that have no part in the grading: {listing(counts.unused)}")
    os.replace(temporary[output], output)


def _solution(record: Any, unused: Counter[str], opened: bool) -> Solution:
    """What is to be graded of a record.

    Args:
        opened: its prompt ended inside a thought, where it does not say.

    Raises:
        RecordError: a field is missing or wrong, or JSON cannot hold what stands in the record.
    """
    if isinstance(record, RecordError):
        raise record
    if not isinstance(record, dict):
        raise RecordError("wrong type", "record", expected=f"an object: {FORM}", got=record)
    for name in ("group_id", "sample_id"):
        fields.identifier(record, name)
    fields.required_text(record, "problem", "", may_be_blank=True)
    if record.get("answer") is None:
        raise RecordError("missing field", "answer", expected="a text or a number", got=f"fields {', '.join(record)}")
    answer = fields.answer(record, "answer", "", required=True)
    text = answer_text(record, "text", "")
    choices = _choices(record.get("choices"))
    option_field = "options" if record.get("options") not in (None, [], {}) else ""
    columns = next(iter(option_columns(record)), {})
    if option_field or columns:
        options, letter = options_and_letter(record, option_field, columns, "answer")
        if choices not in (0, len(options)):
            raise RecordError(
                "wrong number of choices", "choices", expected=f"{len(options)}, as there are options", got=choices
            )
        answer, choices = letter, len(options)
    try:
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError) as cause:
        raise RecordError("not JSON", "record", expected="texts and finite numbers", got=str(cause)) from None
    # None of the others, such as a system text, can change what is right.
    unused.update(name for name, value in record.items() if name not in (*USED, *columns) and value is not None)
    said = fields.from_json_text(record.get(OPENED), OPENED, "true or false")
    if not isinstance(said, bool | None):
        raise RecordError("wrong type", OPENED, expected="true or false", got=said)
    return Solution(answer, text, choices, opened if said is None else said, record["problem"])


def _choices(value: Any) -> int:
    """A number of options, 0 for an open question."""
    value = fields.from_json_text(value, "choices", "a number")
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 26:
        raise RecordError("wrong type", "choices", expected="a number of options from 0 to 26", got=value)
    return value


def _last_reason(path: Path) -> str:
    lines = path.read_text(encoding="ascii").splitlines()
    return f"{len(lines)} rejected, the last one {Reject(**json.loads(lines[-1]))}" if lines else "no record"
