"""Where the final answer of a solution stands, and how a reference answer is handed to math-verify."""

import re

# A box (over-escaped ones too), then what hides a brace (a line break is no escape), then the braces that count.
_BRACES = re.compile(r"\\{1,2}boxed\s*\{|\\\\|\\[{}]|[{}]")
_MATH_DELIMITERS = ((r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$"))


def last_box(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` whose braces balance and that is not blank; None where there is none."""
    last: tuple[int, int] | None = None
    open_braces: list[int | None] = []  # where the content of a box starts; None for any other brace
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (last is None or start > last[0]) and text[start : match.start()].strip():
                last = start, match.start()
        elif token == "{":
            open_braces.append(None)
        elif token.endswith("{") and "boxed" in token:
            open_braces.append(match.end())
    return None if last is None else text[slice(*last)]


def as_math(answer: str) -> str:
    r"""`answer` as one `\boxed{...}`, without its own math delimiters and full stop.

    Bare LaTeX is read as text by math-verify and a full stop after a set makes it unreadable; inside a box, and
    without the stop, both parse.
    """
    stripped = _without_full_stop(answer.strip())
    for left, right in _MATH_DELIMITERS:
        inner = stripped[len(left) : -len(right)]
        long_enough = len(stripped) > len(left) + len(right)
        # `$a$, $b$` is a list of two answers, and the last dollar of `\$` is a currency sign: both stay.
        if (
            long_enough
            and stripped.startswith(left)
            and stripped.endswith(right)
            and left not in inner.replace(r"\$", "")
        ):
            stripped = _without_full_stop(inner.strip())
            break
    boxed = last_box(stripped)
    return rf"\boxed{{{boxed if boxed is not None else stripped}}}"


def _without_full_stop(answer: str) -> str:
    return answer[:-1].rstrip() if answer.endswith((".", "。")) and not answer.endswith("..") else answer
