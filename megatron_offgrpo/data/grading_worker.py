"""One worker of the grading pool: reads requests as JSON lines, answers each in one JSON line.

Started as `python -m megatron_offgrpo.data.grading_worker CPU_SECONDS MEMORY_BYTES THINK_TAG ...`. Kept free of torch
and of most of the package, so that a killed worker is back in about half a second.
"""

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

from math_verify import parse

from megatron_offgrpo.data.answers import MAX_UNBOXED_CHARACTERS, final_answer, reference_answer
from megatron_offgrpo.data.references import reference_fault
from megatron_offgrpo.data.thinking import ThinkTags
from megatron_offgrpo.data.verdict import compare

MAX_EXTRACTED_CHARACTERS = 500
thinking = ThinkTags()
"""Those that the pool asks for, once the worker runs."""


def found_answer(text: str) -> str | None:
    """The final answer after the thinking, as it is written; where nothing announces one, what math-verify finds."""
    part = thinking.final_part(text)
    announced = final_answer(part)
    return announced if announced is not None else _last_mathematics(part[-MAX_UNBOXED_CHARACTERS:])


def _last_mathematics(text: str) -> str | None:
    try:
        found = parse(text, parsing_timeout=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:  # math-verify's parser raises whatever its grammar and sympy raise on text that is no mathematics
        return None
    return str(found[-1]) if found else None


def shown(answer: str) -> str:
    return answer.strip()[:MAX_EXTRACTED_CHARACTERS]


def grade(gold: str, text: str) -> dict[str, Any]:
    """Whether the final answer of `text` equals `gold`."""
    if not gold.strip():
        return {"reward": 0, "status": "empty_gold", "extracted": None}
    if reference_fault(gold) is not None:
        return {"reward": 0, "status": "unreadable_gold", "extracted": None}
    answer = found_answer(text)
    if answer is None:
        return {"reward": 0, "status": "no_answer", "extracted": None}
    verdict = compare(reference_answer(gold), answer)
    status = "unreadable" if verdict == "unreadable" else "ok"
    return {"reward": int(verdict == "equal"), "status": status, "extracted": shown(answer)}


def extract(text: str) -> dict[str, Any]:
    """The final answer of `text`, unjudged."""
    answer = found_answer(text)
    if answer is None:
        return {"reward": 0, "status": "no_answer", "extracted": None}
    return {"reward": 0, "status": "ok", "extracted": shown(answer)}


def answer_request(request: dict[str, Any]) -> dict[str, Any]:
    if request["gold"] is None:
        return extract(request["text"])
    return grade(request["gold"], request["text"])


def warm_up() -> None:
    """Compiles math-verify's patterns and grammar, which the time limit of the first sample should not pay for."""
    _last_mathematics("so 1")
    compare(r"\frac{x^2}{2}", "x")


def main() -> None:
    global thinking
    cpu_seconds, memory_bytes, thinking = float(sys.argv[1]), int(sys.argv[2]), ThinkTags(sys.argv[3:])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which closes the pool
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warm_up()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    # From here on nothing that a library prints may reach the answers' channel or fill the parent's log.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    for line in sys.stdin:
        # The kernel ends the process when the time is up, even inside C code; it is CPU time, so that a busy machine
        # does not change a label.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            reply = answer_request(json.loads(line))
        except MemoryError:
            reply = {"reward": 0, "status": "out_of_memory", "extracted": None}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
