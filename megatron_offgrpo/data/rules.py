"""Rewriting rules: patterns with what takes the place of their matches, applied one after the other."""

import re
from collections.abc import Callable

Replacement = str | Callable[[re.Match[str]], str]
Rules = tuple[tuple[re.Pattern[str], Replacement], ...]

END = r"(?![A-Za-z])"
"""Behind the name of a LaTeX command."""
GROUP = r"{((?:[^{}]|{(?:[^{}]|{[^{}]*})*})*)}"
"""Braces with up to two levels of braces inside."""


def rules(*pairs: tuple[str, Replacement]) -> Rules:
    """The rules in the order in which they apply."""
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


def applied(table: Rules, text: str) -> str:
    """`text` after all the rules."""
    for pattern, replacement in table:
        text = pattern.sub(replacement, text)
    return text


def words(text: str) -> frozenset[str]:
    """The words of a list written as one text."""
    return frozenset(text.split())
