"""Asks a model behind an OpenAI-compatible server about answers that no rule can compare.

The rules come first and are never overruled: only what they call `unreadable` is asked about. Every reply is a line of
the log, which is also the memory: a question that stands there is not asked again, so that a run gives the same labels
when it is repeated, by whichever process.
"""

import fcntl
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megatron_offgrpo.data.grading import Grade
from megatron_offgrpo.data.thinking import ThinkTags
from megatron_offgrpo.errors import ConfigError, DataError, GenerationError
from megatron_offgrpo.openai_server import OpenAiServer, ServerGone
from megatron_offgrpo.progress import say

Verdict = Literal["equal", "different", "unclear"]
Asked = tuple[str, str, str]
"""(problem, reference answer, solution)."""
CONCURRENCY = 16
"""Questions under way at a time."""
MAX_TOKENS = 4096
TIMEOUT_SECONDS = 600.0
MAX_ANSWER_CHARACTERS = 2000
"""The judge reads so much of a solution's end where no final answer was extracted from it."""
PROMPT = """\
Is the answer of a solution the same as the reference answer to the problem? Judge the final answers alone: not the way
to them, and not whether the reference is right. Another form of the same value is the same answer. A part of the answer
that is missing, or a different number, unit, set, order or name where it matters, makes it a different one.

<problem>
{problem}
</problem>
<reference>
{reference}
</reference>
<answer>
{answer}
</answer>

End with one line, either `Verdict: EQUAL` or `Verdict: DIFFERENT`."""
_TAGS = ThinkTags()
_VERDICT = re.compile(r"verdict\W*(equal|different)\b", re.IGNORECASE)


class Judge:
    """Verdicts of one model, remembered in a file of JSON lines (`prompt`, `model`, `reply`, `verdict`).

    Args:
        url: `http://HOST:PORT/v1` of the server.
        model: its name there; see `model_of`.
        log: the file; several processes may use it at a time.

    Raises:
        DataError: the log has a line that is not one.
    """

    def __init__(self, url: str, model: str, log: Path) -> None:
        self._server = OpenAiServer(url, TIMEOUT_SECONDS)
        self.model, self.log = model, log
        self.counts: Counter[str] = Counter()
        """Answers by what came of them: `equal`, `different`, `unclear`, `failed`; and `asked`, questions sent."""
        self._known: dict[str, Verdict] = {}
        """Prompt -> verdict."""
        self._read_bytes = self._read_lines = 0
        self._gone = False
        log.parent.mkdir(parents=True, exist_ok=True)
        with self._locked() as file:
            self._read(file)

    def settle(self, asked: Sequence[Asked], grades: Sequence[Grade]) -> list[Grade]:
        """The grades, with a verdict in the place of each `unreadable`, where there is a clear one.

        An unclear reply or a server that fails leaves the grade as it is.
        """
        prompts = {
            place: _prompt(*one, grade.extracted)
            for place, (one, grade) in enumerate(zip(asked, grades, strict=True))
            if grade.status == "unreadable"
        }
        verdicts = self._verdicts(list(dict.fromkeys(prompts.values())))
        settled = list(grades)
        for place, prompt in prompts.items():
            verdict = verdicts.get(prompt)
            self.counts[verdict or "failed"] += 1
            if verdict in ("equal", "different"):
                settled[place] = Grade(int(verdict == "equal"), "judged", grades[place].extracted)
        return settled

    def _verdicts(self, prompts: list[str]) -> dict[str, Verdict]:
        """The verdict on each prompt for which there is a reply."""
        new = [prompt for prompt in prompts if prompt not in self._known]
        if new:
            with ThreadPoolExecutor(CONCURRENCY) as pool:
                replies = list(pool.map(self._reply, new))
            given = {prompt: reply for prompt, reply in zip(new, replies, strict=True) if reply is not None}
            if given:
                self._remember(given)
        return {prompt: self._known[prompt] for prompt in prompts if prompt in self._known}

    def _reply(self, prompt: str) -> str | None:
        """What the model writes; None where the server fails."""
        if self._gone:
            return None
        try:
            answer: Any = self._server.ask(
                lambda: self._server.client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "user", "content": prompt}],
                    temperature=0.0,
                    seed=0,
                    max_tokens=MAX_TOKENS,
                )
            )
            if not answer.choices:
                raise self._server.odd("a completion without a choice")
        except GenerationError as failure:
            say(f"judge: {failure}")
            # Each further question would wait as long.
            self._gone = isinstance(failure, ServerGone)
            return None
        text: str = answer.choices[0].message.content or ""
        # A lone surrogate in the server's JSON would not fit into a UTF-8 file.
        return text.encode("utf-8", "replace").decode()

    def _remember(self, replies: dict[str, str]) -> None:
        """Adds to the log what no other process has added meanwhile; the first reply to a question counts."""
        self.counts["asked"] += len(replies)
        with self._locked() as file:
            self._read(file)
            for prompt, reply in replies.items():
                if prompt not in self._known:
                    line = {"prompt": prompt, "model": self.model, "reply": reply, "verdict": verdict_of(reply)}
                    file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            self._read(file)

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        try:
            with self.log.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
        except OSError as cause:
            raise ConfigError(f"the judge's log cannot be used ({cause.strerror})", where=str(self.log)) from None

    def _read(self, file: BinaryIO) -> None:
        """Takes in the lines that are new; what a kill left of a last line is cut off."""
        file.seek(self._read_bytes)
        *lines, torn = file.read().split(b"\n")
        for line in lines:
            self._read_lines += 1
            try:
                found = json.loads(line)
                model, prompt, verdict = found["model"], found["prompt"], found["verdict"]
                if verdict not in ("equal", "different", "unclear"):
                    raise ValueError(f"verdict {verdict!r}")
            except (ValueError, KeyError, TypeError) as cause:
                where = f"{self.log}:{self._read_lines}"
                raise DataError(f"not a line of a judge's log ({cause})", where=where, remedy="delete it") from None
            if model == self.model:
                self._known.setdefault(prompt, verdict)
            self._read_bytes += len(line) + 1
        if torn:
            file.truncate(self._read_bytes)


def verdict_of(reply: str) -> Verdict:
    """The verdict that a reply states after its thinking; `unclear` where it states none, or both."""
    stated = {found.lower() for found in _VERDICT.findall(_TAGS.final_part(reply))}
    if stated == {"equal"}:
        return "equal"
    return "different" if stated == {"different"} else "unclear"


def _prompt(problem: str, reference: str, solution: str, extracted: str | None) -> str:
    answer = extracted if extracted is not None else solution[-MAX_ANSWER_CHARACTERS:]
    return PROMPT.format(problem=problem, reference=reference, answer=answer)


def model_of(url: str | None, model: str | None) -> str | None:
    """The judge's model: the one that is named, or the only one at the address; None without a judge.

    Raises:
        ConfigError: a model without an address, or a server with several.
        GenerationError: the server does not tell.
    """
    if url is None and model is not None:
        raise ConfigError("a model without a server", where="--judge-model", expected="--judge http://HOST:PORT/v1")
    if url is None or model is not None:
        return model
    return OpenAiServer(url, TIMEOUT_SECONDS).only_model("--judge-model")


def log_beside(output: str | Path) -> Path:
    """Where the judge's log of an output lies: it outlives the output, which may be made again."""
    path = Path(output).absolute()
    return path.with_name(path.name + ".judge.jsonl")


def judge_line(counts: Mapping[str, int]) -> str:
    """What came of the answers that the rules could not read, for a person."""
    found = {name: counts.get(name, 0) for name in ("equal", "different", "unclear", "failed")}
    told = ", ".join(f"{name} {number}" for name, number in found.items())
    stay = found["unclear"] + found["failed"]
    return (
        f"{sum(found.values())} answers that no rule reads, judged: {told} ({counts.get('asked', 0)} questions asked); "
        f"{stay} stay unreadable"
    )
