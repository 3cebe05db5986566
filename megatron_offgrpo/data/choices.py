"""The letter of a multiple-choice answer, in all usual dress."""

import re

from megatron_offgrpo.data.normalise import plain

_WORD = r"(?:(?:the\s+)?(?:correct\s+)?(?:answer|option|choice|故选|选项|选)\s*(?:is|:|：|为|是)?\s*:?\s*)"
_LETTER = r"(?:\(\s*[A-Z]\s*\)|\[\s*[A-Z]\s*\]|[A-Z])(?![A-Za-z])"
_DRESSED = re.compile(
    rf"^\s*{_WORD}{{0,2}}(?:\(\s*(?P<bracketed>[A-Z])\s*\)|\[\s*(?P<square>[A-Z])\s*\]|{{?(?P<bare>[A-Z])}}?)"
    r"(?P<rest>(?![A-Za-z0-9]).*|(?<=[)\]]).*)$",
    re.IGNORECASE | re.DOTALL,
)
# What follows a letter: its option's text ("B. 12 cm", "B) 12", "B - 24", after a bracket any), or that it is right.
_OPTION_TEXT = re.compile(r"\s*(?:[.):]|-+\s|项|选项)|$")
_AFFIRMED = re.compile(
    r"[.):]?\s*(?:is|was|must be)\s+(?:the\s+)?(?:only\s+)?(?:correct|right|true|answer)"
    r"(?:\s+(?:answer|option|choice|one))?\s*[.!]?\s*",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"[\s,;(]*(?:(?:and|but)\s+)?(?:\bnot\b|\brather\s+than\b|\binstead\s+of\b|而?不(?:是|选)|而非)\s*"
    rf"(?:the\s+)?(?:(?:option|choice)\s+)?{_LETTER}(?:\s*(?:,|\bor\b|\bnor\b|\band\b|和|或)+\s*{_LETTER})*\s*\)?"
)
"""Other options, as not chosen: ", not D", "rather than (D)", 不选D."""
# Another option beside the first, something else said of the letter, or the letter in a formula.
_MORE_THAN_A_CHOICE = re.compile(
    rf"\s*(?:[,;/&+]|-+|\band\b|\bor\b|和|或|与|及)+\s*{_LETTER}|.*(?<!\w)[(\[]\s*[A-Z]\s*[)\]]"
    r"|.*[,;]\s*(?:\w+\s+){0,2}(?-i:[A-Z])\s*(?:[.):]|$)"
    rf"|.*(?:\band\b|\bor\b|和|或)\s*(?:option\s+)?{_LETTER}\s*(?:[.)]|$)"
    r"|\s*[.):]?\s*(?i:is|are|was|isn't|not|cannot|does|doesn't)\b|\s*[.):]?\s*(?:不|错|非|是错)|\s*[\^_+*/=<>]"
    r"|\s*-+\s*[A-Za-z]\s*$",
    re.DOTALL,
)


def chosen_letter(text: str) -> str | None:
    """The letter that an answer to a multiple-choice question names, as it is written; a small one too, if alone."""
    answer = plain(text)
    alone = re.fullmatch(r"\(?\s*([a-z])\s*\)?", answer)
    return alone[1].upper() if alone else choice_letter(answer)


def choice_letter(answer: str) -> str | None:
    """The letter that `answer`, normalised, names; None where it names none.

    Several letters, as in `A, C`, name none, nor does a letter of which something else is said, as in `A is false`; a
    small one names an option only as `(c)`, else it is a variable.
    """
    small = re.fullmatch(r"\(\s*([a-h])\s*\)", answer)
    if small is not None:
        return small[1].upper()
    match = _DRESSED.match(answer)
    if match is None:
        return None
    letter = next(group for group in (match["bracketed"], match["square"], match["bare"]) if group)
    rest = _DENIED.sub("", match["rest"])
    if not letter.isupper() or _AFFIRMED.fullmatch(rest):
        return letter if letter.isupper() else None
    if _MORE_THAN_A_CHOICE.match(rest) or (match["bare"] and not _OPTION_TEXT.match(rest)):
        return None
    return letter


def bare_letter(answer: str) -> str | None:
    """The capital letter that is all of `answer` but for a pair of brackets."""
    match = re.fullmatch(r"\s*\(?\s*([A-Z])\s*\)?\s*", answer)
    return match[1] if match else None
