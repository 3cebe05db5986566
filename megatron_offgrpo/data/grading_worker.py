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
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from megatron_offgrpo.data.answers import as_math, last_box
from megatron_offgrpo.data.thinking import ThinkTags

MAX_EXTRACTED_CHARACTERS = 500
MAX_UNBOXED_CHARACTERS = 4000
"""Without a box only the end of a solution is searched: math-verify's patterns are slow on long texts."""
thinking = ThinkTags()
"""Those that the pool asks for, once the worker runs."""


@lru_cache(maxsize=256)
def parsed_gold(gold: str) -> list[Any]:
    return _parse(as_math(gold))


def parsed_answer(text: str) -> list[Any]:
    """math-verify's reading of the last box after the thought, or of the end of the text where there is no box."""
    part = thinking.final_part(text)
    box = last_box(part)
    return _parse(as_math(box) if box is not None else part[-MAX_UNBOXED_CHARACTERS:])


def _parse(text: str) -> list[Any]:
    try:
        return list(parse(text, parsing_timeout=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:  # math-verify's parser raises whatever its grammar and sympy raise on text that is no mathematics
        return []


def shown(answer: list[Any]) -> str:
    """The text of an extracted answer: math-verify puts it last, behind the parsed expression."""
    return str(answer[-1])[:MAX_EXTRACTED_CHARACTERS]


def grade(gold: str, text: str) -> dict[str, Any]:
    """Whether the final answer of `text` equals `gold`."""
    if not gold.strip():
        return {"reward": 0, "status": "empty_gold", "extracted": None}
    golds = parsed_gold(gold)
    if not golds:
        return {"reward": 0, "status": "unreadable_gold", "extracted": None}
    answer = parsed_answer(text)
    if not answer:
        return {"reward": 0, "status": "no_answer", "extracted": None}
    correct = any(_equal(one, other) for one in golds for other in answer)
    return {"reward": int(correct), "status": "ok", "extracted": shown(answer)}


def _equal(gold: Any, answer: Any) -> bool:
    try:
        return bool(verify(gold, answer, timeout_seconds=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:  # sympy raises on comparisons it cannot make; such a pair is not equal
        return False


def extract(text: str) -> dict[str, Any]:
    """The final answer of `text`, unjudged."""
    answer = parsed_answer(text)
    if not answer:
        return {"reward": 0, "status": "no_answer", "extracted": None}
    return {"reward": 0, "status": "ok", "extracted": shown(answer)}


def answer_request(request: dict[str, Any]) -> dict[str, Any]:
    if request["gold"] is None:
        return extract(request["text"])
    return grade(request["gold"], request["text"])


def warm_up() -> None:
    """Compiles math-verify's patterns and grammar, which the time limit of the first sample should not pay for."""
    _equal(_parse("so 1")[0], _parse(as_math(r"\frac{x^2}{2}"))[0])


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
