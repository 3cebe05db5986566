"""`offgrpo grade`: scores solutions that were made elsewhere, a JSON line each."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_offgrpo.data.fields import plain_number
from megatron_offgrpo.data.grading import GradingPool
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.evaluation.grading import Solution, score
from megatron_offgrpo.evaluation.json_lines import json_line
from megatron_offgrpo.progress import progress, say

FORM = "lines with group_id, sample_id, problem, answer and text"
SHOWN = 120


@dataclass
class GradeCounts:
    """What a file gave."""

    graded: int = 0
    lenient: int = 0
    strict: int = 0
    rejected: int = 0
    rejects: Path | None = None
    """Where the rejected lines are listed; None without any."""


class _Malformed(Exception):
    """A line that cannot be graded, and why."""


def grade_file(source: Path, output: Path, *, processes: int | None = None, seconds: float = 5.0) -> GradeCounts:
    """Adds `strict`, `lenient`, `extracted` and `reason` to each line of `source`, in order, streaming.

    Lines that cannot be graded are listed in `OUTPUT.rejects.jsonl` with file, line and reason. The output is the same
    for any number of processes.

    Raises:
        DataError: the input cannot be read, or none of its lines can be graded.
        ConfigError: input and output are one file.
    """
    if source.absolute() == output.absolute():
        raise ConfigError("input and output are one file", where=str(output))
    rejects = output.with_name(output.name + ".rejects.jsonl")
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in (output, rejects)}
    counts = GradeCounts()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with (
            temporary[output].open("w", encoding="utf-8") as graded,
            temporary[rejects].open("w", encoding="ascii") as rejected,
            GradingPool(processes, seconds) as pool,
            progress(f"grading {source.name}", source.stat().st_size) as advance,
        ):
            pending: list[dict[str, Any]] = []

            def solutions() -> Iterator[Solution]:
                for number, line in _lines(source):
                    advance(len(line))
                    try:
                        record, solution = _parse(line)
                    except _Malformed as cause:
                        reject = {"where": f"{source}:{number}", "reason": str(cause), "line": _shown(line)}
                        rejected.write(json.dumps(reject) + "\n")
                        counts.rejected += 1
                        continue
                    pending.append(record)
                    yield solution

            for scored in score(solutions(), pool):
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
                "no line can be graded", where=str(source), expected=FORM, got=_last_reason(temporary[rejects])
            )
        _publish(counts, temporary, output, rejects)
    except OSError as cause:
        raise DataError(
            f"cannot read or write ({cause.strerror or cause})", where=str(cause.filename or source)
        ) from None
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return counts


def _publish(counts: GradeCounts, temporary: dict[Path, Path], output: Path, rejects: Path) -> None:
    rejects.unlink(missing_ok=True)  # of an earlier run
    if counts.rejected:
        os.replace(temporary[rejects], rejects)
        counts.rejects = rejects
        say(f"{counts.rejected} line(s) left out, listed in {rejects}")
    os.replace(temporary[output], output)


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    with source.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _parse(line: bytes) -> tuple[dict[str, Any], Solution]:
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as cause:
        raise _Malformed(f"not a JSON line ({cause})") from None
    if not isinstance(record, dict):
        raise _Malformed(f"expected an object, got {type(record).__name__}")
    for name in ("group_id", "sample_id", "problem", "answer", "text"):
        value = record.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None:
            raise _Malformed(f"no `{name}`")
        if not (isinstance(value, str) or (number and name != "text" and name != "problem")):
            raise _Malformed(f"`{name}` is of type {type(value).__name__}, expected a text")
    choices = record.get("choices", 0)
    if not isinstance(choices, int) or isinstance(choices, bool) or not 0 <= choices <= 26:
        raise _Malformed(f"`choices` is {choices!r}, expected a number of options from 0 to 26")
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _Malformed("a lone surrogate, which no UTF-8 file can hold") from None
    answer = record["answer"]
    gold = answer if isinstance(answer, str) else plain_number(answer)
    return record, Solution(gold, record["text"], choices)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _shown(line: bytes) -> str:
    text = line.decode("utf-8", "replace").strip()
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _last_reason(path: Path) -> str:
    lines = path.read_text(encoding="ascii").splitlines()
    return f"{len(lines)} lines, the last one: {json.loads(lines[-1])['reason']}" if lines else "no line"
