"""The shape of a normalised answer: a list, entries in brackets, a matrix, words and mathematics, or mathematics."""

import re
from dataclasses import dataclass
from functools import lru_cache

from megatron_offgrpo.data.rules import words as word_set
from megatron_offgrpo.data.units import NOT_COUNTED, can_be_counted, is_unit_word, unit_of


@dataclass(frozen=True)
class Leaf:
    """Mathematics without words."""

    text: str


@dataclass(frozen=True)
class Phrase:
    """Words with mathematics between them."""

    text: str
    parts: tuple["Leaf | tuple[str, ...]", ...]
    """Mathematics, and runs of words, in their order."""


@dataclass(frozen=True)
class Listing:
    """Answers side by side, in any order."""

    text: str
    items: tuple["Node", ...]
    ordered: bool = False
    """With an ellipsis the order counts."""
    alternatives: bool = False
    """Joined by `or`."""


@dataclass(frozen=True)
class Bracket:
    """Entries in a pair of brackets, which need not match: `[1,2)`."""

    text: str
    opened: str
    items: tuple["Node", ...]
    closed: str


@dataclass(frozen=True)
class Matrix:
    """Rows of a matrix."""

    text: str
    rows: tuple[tuple["Node", ...], ...]


Node = Leaf | Phrase | Listing | Bracket | Matrix

_TOKEN = re.compile(
    r"\s+|\\[A-Za-z]+|\\.|\d+(?:\.\d+)?|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\W\d_]+(?:['-][^\W\d_]{2,})*|."
)
_OPENERS = {"(": "(", "[": "[", "{": "", r"\{": "{", r"\langle": "(", r"\lfloor": "|", r"\lceil": "|"}
_CLOSERS = {")": ")", "]": "]", "}": "", r"\}": "}", r"\rangle": ")", r"\rfloor": "|", r"\rceil": "|"}
_JOINERS = frozenset({",", ";", "and", "or", "AND", "OR", "和", "或", "或者", "以及", "与", "及"})
_ALTERNATIVES = frozenset({"or", "OR", "或", "或者"})
_RELATION_WORDS = {r"\equiv": "equiv", r"\ldots": "...", r"\to": "to", r"\rightarrow": "to"}
_OPERATORS = frozenset(
    {
        "+",
        "-",
        "*",
        "/",
        "^",
        "_",
        "=",
        "<",
        ">",
        "(",
        ")",
        r"\cdot",
        r"\times",
        r"\div",
        r"\pm",
        r"\le",
        r"\ge",
        r"\ne",
    }
)
_FUNCTIONS = word_set(
    "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan log ln lg exp sqrt lcm gcd det infty pi"
)
_SHORT_WORDS = word_set("no on is it up or of he we me my by an at to so do go if us am pm be in as ox ok")
_UNIT_LETTERS = word_set("m g s h l L N J K A V W C T F")
"""One-letter units: only behind a number and a blank, since `5m` may be algebra."""
_GLUED_UNITS = word_set(
    "km cm mm kg mg ml mL ft lb lbs mph kmh min hr hrs hours hour minutes seconds days cents dollars"
)
_ROMAN = re.compile(r"(?=[MDCLXVI]{2})M{0,3}(?:CM|CD|D?C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})")
_NAME = re.compile(r"[A-Z][a-z]")
_LETTERS_OF_TEXT = re.compile(r"{([A-Za-z])}{([A-Za-z])}")
_VOWEL = re.compile("[aeiouyAEIOUY]")
_MATRIX = re.compile(
    r"\\begin\s*{([pbB]?)(?:small)?(?:matrix|array)}(?:\s*{[clr| ]*})?(.*)\\end\s*{\1(?:small)?(?:matrix|array)}",
    re.DOTALL,
)


@lru_cache(maxsize=2048)
def structure(text: str) -> Node:
    """The shape of `text`, which is normalised."""
    items, joiners = _split(text)
    if len(items) > 1:
        whole = tuple(_item(one) for one in items)
        nodes = tuple(node for one in whole for node in (one.items if isinstance(one, Listing) else (one,)))
        return Listing(text, nodes, r"\ldots" in text, bool(joiners & _ALTERNATIVES))
    return _item(text)


def _item(text: str) -> Node:
    text = text.strip()
    if r"\pm" in text or r"\mp" in text:
        upper = text.replace(r"\pm", "+").replace(r"\mp", "-")
        lower = text.replace(r"\pm", "-").replace(r"\mp", "+")
        return Listing(text, (_item(upper), _item(lower)))
    matrix = _MATRIX.fullmatch(text)
    if matrix and r"\begin" not in matrix[2]:
        rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", matrix[2]) if row.strip()]
        return Matrix(text, tuple(tuple(structure(cell.strip()) for cell in row.split("&")) for row in rows))
    bracket = _bracket(text)
    if bracket is not None:
        return bracket
    two_letters = _LETTERS_OF_TEXT.fullmatch(text)
    parts = [(two_letters[1] + two_letters[2],)] if two_letters else _parts(text)
    if all(isinstance(part, Leaf) for part in parts):
        return Leaf(text)
    return Phrase(text, tuple(parts))


def _bracket(text: str) -> Bracket | Leaf | None:
    tokens = _TOKEN.findall(text)
    if not tokens or not _OPENERS.get(tokens[0]) or not _CLOSERS.get(tokens[-1]):
        return None
    depth = 0
    for index, token in enumerate(tokens):
        depth += (token in _OPENERS) - (token in _CLOSERS)
        if depth == 0 and index < len(tokens) - 1:
            return None
    if depth:
        return None
    opened, closed = _OPENERS[tokens[0]], _CLOSERS[tokens[-1]]
    inner = "".join(tokens[1:-1]).strip()
    items, _ = _split(inner)
    if len(items) < 2 and opened != "{":
        return None
    if opened == "|" or r"\mid" in inner or "|" in inner or ":" in inner:
        return None
    nodes = tuple(structure(one.strip()) for one in items)
    if r"\ldots" in inner:
        nodes = tuple(node for one in nodes for node in (one.items if isinstance(one, Listing) else (one,)))
    return Bracket(text, opened, nodes, closed)


def _split(text: str) -> tuple[list[str], frozenset[str]]:
    """The pieces between the commas, semicolons, `and`s and `or`s outside brackets, and which of these there were."""
    depth, pieces, joiners = 0, [""], set()
    for token in _TOKEN.findall(text):
        depth += (token in _OPENERS or token == r"\begin") - (token in _CLOSERS or token == r"\end")
        if token == r"\begin" or token == r"\end":
            pieces[-1] += token
        elif depth == 0 and token in _JOINERS:
            joiners.add(token)
            pieces.append("")
        else:
            pieces[-1] += token
    return [piece.strip() for piece in pieces if piece.strip()], frozenset(joiners)


def _parts(text: str) -> list[Leaf | tuple[str, ...]]:
    """Mathematics and runs of words in turn."""
    tokens = _TOKEN.findall(text)
    parts: list[Leaf | tuple[str, ...]] = []
    math, words, depth = "", [], 0  # type: ignore[var-annotated]
    index = 0

    def close_words() -> None:
        nonlocal words
        if words:
            parts.append(tuple(words))
            words = []

    def close_math() -> None:
        nonlocal math
        if math.strip():
            parts.append(Leaf(math.strip()))
        math = ""

    while index < len(tokens):
        token = tokens[index]
        depth += (token == "{") - (token == "}")
        if depth == 0 and token in _RELATION_WORDS:
            close_math()
            words.append(_RELATION_WORDS[token])
        elif depth == 0 and _is_word(tokens, index, bool(words) and not math.strip()):
            close_math()
            words += _scales_apart(token)
            index = _unit_tail(tokens, index, words)
        elif token.isspace():
            math += " "
        elif words and not math.strip() and token in "-'\"()":
            pass  # dress of words
        else:
            close_words()
            math += token
        index += 1
        if words and math.strip():
            close_words()
    if math.strip() and words:
        close_words()
    close_words()
    close_math()
    return [_marked(part, after_value=index > 0) for index, part in enumerate(parts)]


def _marked(part: "Leaf | tuple[str, ...]", after_value: bool) -> "Leaf | tuple[str, ...]":
    """Words behind mathematics that count nothing begin with `NOT_COUNTED`, so that nobody drops them."""
    return part if isinstance(part, Leaf) or not after_value or can_be_counted(part) else (NOT_COUNTED, *part)


def _scales_apart(token: str) -> list[str]:
    """The Chinese scales at the beginning of a word apart: 万 and 元 of 万元."""
    scales = []
    while token[0] in "十百千万亿" and unit_of(token) is None and len(token) > 1:
        scales.append(token[0])
        token = token[1:]
    return [*scales, token]


def _unit_tail(tokens: list[str], index: int, words: list[str]) -> int:
    """Takes the powers and quotients behind a unit, as in `m / s ^{2}`; the index of the last token taken."""
    if unit_of(tokens[index]) is None:
        return index
    while True:
        rest = "".join(tokens[index + 1 :])
        power = re.match(r"\s*\^\s*(?:{\s*(-?\d)\s*}|(\d))", rest) or re.match(r"(\d)(?![\w.])", rest)
        quotient = re.match(r"\s*/\s*([^\W\d_]+)", rest)
        found = power or quotient
        if found is None:
            return index
        words += [f"^{power[1] or power[2]}" if power.re.groups > 1 else f"^{power[1]}"] if power else ["/", found[1]]
        length = len(found.group())
        while length > 0:
            index += 1
            length -= len(tokens[index])


def _is_word(tokens: list[str], index: int, after_word: bool) -> bool:
    token = tokens[index]
    if not token[0].isalpha():
        return False
    if not token.isascii():
        return True
    before = tokens[index - 1] if index else ""
    glued_before = bool(before) and (before[0].isdigit() or before in (")", "}", "_", "^"))
    rest = [one for one in tokens[index + 1 :] if not one.isspace()]
    following = rest[0] if rest else ""
    if token in _FUNCTIONS:
        return False
    if token == "mod" or token in ("am", "pm"):
        return True
    previous = next((one for one in reversed(tokens[:index]) if not one.isspace()), "")
    after_number = bool(previous) and (previous[0].isdigit() or previous in (")", "}", "]", r"\pi"))
    after_value = after_number or (bool(before) and before.isspace() and len(previous) == 1 and previous.isalpha())
    if len(token) == 1:
        is_unit = after_number and not glued_before and token in _UNIT_LETTERS
        ends = not following or following[0].isdigit() or following == "/" or following == "^"
        return (is_unit and ends) or (after_word and token in "aAI" and (not following or following[0].isalpha()))
    if glued_before and token in _GLUED_UNITS:
        return True
    if glued_before:
        return len(token) > 3 and bool(_VOWEL.search(token)) and before not in ("_", "^")
    if following in _OPERATORS or previous in _OPERATORS - {"(", ")"}:
        is_function = following == "(" and tokens[index + 1] == "("
        return (len(token) > 3 and bool(_VOWEL.search(token))) or (
            is_unit_word(token) and after_value and not is_function
        )
    is_short_word = token.casefold() in _SHORT_WORDS or _NAME.fullmatch(token) or _ROMAN.fullmatch(token)
    return len(token) > 2 or bool(is_short_word) or (is_unit_word(token) and (after_value or after_word))
