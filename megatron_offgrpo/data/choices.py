"""The letter of a multiple-choice answer, in all usual dress."""

import re

from megatron_offgrpo.data.normalise import plain

_WORD = r"(?:(?:the\s+)?(?:correct\s+)?(?:answer|option|choice|选项|选)\s*(?:is|:|：|为|是)?\s*:?\s*)"
# A letter alone, in brackets, or before its option's text: "B", "(B)", "B. 12 cm", "B) 12", "B - 24", "B, not A".
_DRESSED = re.compile(
    rf"^\s*{_WORD}{{0,2}}(?:\(\s*(?P<bracketed>[A-Z])\s*\)|\[\s*(?P<square>[A-Z])\s*\]|{{?(?P<bare>[A-Z])}}?)"
    r"(?P<rest>\s*$|\s*(?:[.):、]|\)\s|\s-+\s|\s*,?\s*(?:and\s+)?not\b|\s*项|\s*选项).*|(?<=[)\]]).*)$",
    re.IGNORECASE | re.DOTALL,
)


def chosen_letter(text: str) -> str | None:
    """The letter that an answer to a multiple-choice question names, as it is written; a small one too, if alone."""
    answer = plain(text)
    alone = re.fullmatch(r"\(?\s*([a-z])\s*\)?", answer)
    return alone[1].upper() if alone else choice_letter(answer)


def choice_letter(answer: str) -> str | None:
    """The letter that `answer`, normalised, names; None where it names none.

    Several letters, as in `A, C`, name none; a small one names an option only as `(c)`, else it is a variable.
    """
    small = re.fullmatch(r"\(\s*([a-h])\s*\)", answer)
    if small is not None:
        return small[1].upper()
    match = _DRESSED.match(answer)
    if match is None:
        return None
    letter = next(group for group in (match["bracketed"], match["square"], match["bare"]) if group)
    return letter if letter.isupper() else None


def bare_letter(answer: str) -> str | None:
    """The capital letter that is all of `answer` but for a pair of brackets."""
    match = re.fullmatch(r"\s*\(?\s*([A-Z])\s*\)?\s*", answer)
    return match[1] if match else None
