"""What stands on the left of an answer: a name that may be left out, or an equation that may not."""

import re

_GREEK = (
    r"\\(?:alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|(?:var)?theta|iota|kappa|lambda|mu|nu|xi|(?:var)?rho|sigma"
    r"|tau|upsilon|(?:var)?phi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega|ell)(?![A-Za-z])"
)
_ARGUMENT = r"\s*(?:[A-Za-z]|-?\d+(?:\.\d+)?)\s*"
_NAME = (
    rf"(?:(?:[A-Za-z]|{_GREEK})(?:_\s*(?:{{(?:[^{{}}]|{{[^{{}}]*}})*}}|\w))?\s*'*(?:\({_ARGUMENT}(?:,{_ARGUMENT})*\))?"
    r"|P\s*\([^=()]*(?:\\cap|\\cup|[|<>]|\\[lg]e(?![A-Za-z]))[^=()]*\)"
    r"|m?\s*\\(?:overline|bar|hat|vec|tilde|widehat|overrightarrow|m?angle|triangle)\s*(?:{\s*[A-Za-z]{1,4}\s*}|[A-Za-z]{1,4})"
    r"|[A-Z]{2,4}|\|\s*[A-Z]{2}\s*\||\[[A-Z]{3,4}\])"
)
_NAMED = re.compile(rf"\s*({_NAME})\s*(?:=(?!=)|\\in(?![A-Za-z])|\\equiv(?![A-Za-z]))\s*(.+)", re.DOTALL)
_NAMED_LAST = re.compile(rf"([^=]+)=\s*{_NAME}\s*")
_INTRODUCED = re.compile(r"\s*((?:[^\W\d]+(?:[ '-][^\W\d]+)*))\s*(=|:|\bis\b|\bare\b|为|是)\s*(?=.*\d)(.+)", re.DOTALL)
_WORD = re.compile(r"(?=\w*[aeiouyAEIOUY])[^\W\d_]{4,}|\b(?:sum|age)\b|[^\x00-\x7f]", re.IGNORECASE)
_SHORT_WORD = re.compile(r"(?=\w*[aeiouyAEIOUY])[^\W\d_]{3,}|[^\x00-\x7f]")
_LETTERS_IN_TURN = re.compile(r"abcd\w*|\w*wxyz|\w*uvwx\w*")
"""A product of four variables, and no word."""


def binding(text: str) -> tuple[str, str] | None:
    """The name or words on the left of an answer, and what they are said to be; None where there is more or nothing.

    `x=5`, `f(3)=12`, `AB=5`, `the area is 12` have one; `x+y=1`, `x^2=4` and `|x|=3` say something else.
    """
    named = _NAMED.fullmatch(text)
    if named is not None:
        return named[1].strip(), named[2].strip()
    introduced = _INTRODUCED.fullmatch(text)
    if introduced is None:
        return None
    words = introduced[1]
    real = {"=": _WORD, ":": _SHORT_WORD}.get(introduced[2])
    if real is None:
        return (words, introduced[3].strip()) if re.search(r"[^\W\d_]{2}|[^\x00-\x7f]", words) else None
    return (words, introduced[3].strip()) if real.search(words) and not _LETTERS_IN_TURN.fullmatch(words) else None


def right_side(text: str) -> str | None:
    """What an answer says behind its name or its computation (`2+3=5`); None where it is no such thing."""
    bound = binding(text)
    if bound is not None:
        return _last(bound[1])
    parts = text.split("=")
    if len(parts) > 1 and all(part.strip() for part in parts) and all(_only_numbers(part) for part in parts):
        return parts[-1].strip()
    last = _NAMED_LAST.fullmatch(text)
    return last[1].strip() if last else None


def _last(value: str) -> str:
    r"""The end of a chain: `9\pi` of `\pi r^2 = 9\pi`."""
    return value if re.search(r"[,;<>]|\\(?:le|ge|ne|in)(?![A-Za-z])", value) else value.rsplit("=", 1)[-1].strip()


def _only_numbers(text: str) -> bool:
    bare = re.sub(_GREEK, "x", text)
    return not re.search(r"[^\W\d_]|[<>,]", re.sub(r"\\[A-Za-z]+|\b(?:degree|percent)\b", " ", bare))
