"""Whether two answers are equal: shape by shape, words as words, mathematics by math-verify."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from megatron_offgrpo.data.bindings import bindings
from megatron_offgrpo.data.choices import bare_letter, choice_letter
from megatron_offgrpo.data.engine import Verdict, same_mathematics, same_set, squeezed
from megatron_offgrpo.data.left_sides import right_side
from megatron_offgrpo.data.normalise import MAX_CHARACTERS, plain
from megatron_offgrpo.data.number_values import number
from megatron_offgrpo.data.rules import words
from megatron_offgrpo.data.structure import Bracket, Leaf, Listing, Matrix, Node, Phrase, structure
from megatron_offgrpo.data.units import NEVER_COUNTED, SCALES, measure, unit_of

_SPAN = re.compile(r"\s*([\d.]+)\s*(?:to|~|至|到)\s*([\d.]+)\s*")
"""`3 to 5`: a range or a ratio."""
_LIST_OF_ONE = re.compile(r"\s*\[[^][,;]*\]\s*")
"""`[42]`, which math-verify takes for 42."""
_HARD_WORDS = NEVER_COUNTED - words("of to from by the and for are is power")


@dataclass(frozen=True)
class _Quantity:
    value: str
    base: str
    factor: Fraction
    compound: bool


def compare(gold: str, answer: str) -> Verdict:
    """Whether two final answers say the same.

    Args:
        gold: the reference answer, as it was written.
        answer: the answer of a solution, as it was written.

    Returns:
        `equal`; `different`; `unreadable` where the texts differ and at least one holds mathematics that was not read
        whole.
    """
    if max(len(gold), len(answer)) > MAX_CHARACTERS:
        return "equal" if gold.split() == answer.split() else "unreadable"
    return _compare(plain(gold), plain(answer))


@lru_cache(maxsize=4096)
def _compare(one: str, other: str) -> Verdict:
    if not one or not other:
        return "unreadable"
    if squeezed(one) == squeezed(other):
        return "equal"
    letters = [choice_letter(one), choice_letter(other)]
    if letters[0] and letters[1] and (bare_letter(one) or bare_letter(other)):
        return "equal" if letters[0] == letters[1] else "different"
    bound = _bound(one, other)
    if bound is not None:
        return bound
    verdict = _same(structure(one), structure(other))
    for shorter in () if verdict == "equal" else _shorter(one, other):
        if _same(*map(structure, shorter)) == "equal":
            return "equal"
    return verdict


def _bound(one: str, other: str) -> Verdict | None:
    """Values with names are compared by name, beside a list or tuple in the order of the names."""
    first, second = bindings(one), bindings(other)
    if first is not None and second is not None:
        if set(first.names) != set(second.names):
            return "different"
        return _same(*(structure(each.tuples(first.names)) for each in (first, second)))
    if first is not None:
        return _same(structure(first.tuples(first.usual_order())), structure(other))
    return _bound(other, one) if second is not None else None


def _shorter(one: str, other: str) -> Iterator[tuple[str, str]]:
    """Readings where one of two answers alone says more: `x = 7` beside `7`, `the area is 7`, `3 to 5` beside `3-5`."""
    rights = [right_side(one), right_side(other)]
    if (rights[0] is None) != (rights[1] is None):
        yield rights[0] or one, rights[1] or other
    spans = [_SPAN.fullmatch(one), _SPAN.fullmatch(other)]
    if (spans[0] is None) != (spans[1] is None):
        for dash in (":", "-"):
            texts = (
                match[1] + dash + match[2] if match else text for match, text in zip(spans, (one, other), strict=True)
            )
            first, second = texts
            yield first, second


def _same(one: Node, other: Node) -> Verdict:
    if isinstance(one, Listing) and isinstance(other, Listing):
        return _listings(one, other)
    if isinstance(one, Bracket) and isinstance(other, Bracket):
        if (one.opened, one.closed) != (other.opened, other.closed):
            return "different"
        return (
            _in_any_order(one.items, other.items)
            if one.opened == "{" and r"\ldots" not in one.text
            else _in_order(one.items, other.items)
        )
    if isinstance(one, Matrix) or isinstance(other, Matrix):
        return _matrices(one, other)
    if isinstance(one, Phrase) or isinstance(other, Phrase):
        return _phrases(one, other)
    for first, second in ((one, other), (other, one)):
        if isinstance(first, Bracket) and isinstance(second, Listing):
            if first.opened == "{":
                return _in_any_order(first.items, second.items)
            return _in_order(first.items, second.items) if (first.opened, first.closed) == ("(", ")") else "different"
        if isinstance(first, Bracket) and first.opened == "{" and len(first.items) == 1 and isinstance(second, Leaf):
            return _same(first.items[0], second)
    for first, second in ((one, other), (other, one)):
        if isinstance(first, Listing) and first.alternatives and isinstance(second, Leaf):
            return same_set(tuple(item.text for item in first.items), second.text)
    if bool(_LIST_OF_ONE.fullmatch(one.text)) != bool(_LIST_OF_ONE.fullmatch(other.text)):
        return "different"
    if isinstance(one, Listing) or isinstance(other, Listing):
        return "different" if r"\ldots" in one.text + other.text else same_mathematics(one.text, other.text)
    return same_mathematics(one.text, other.text)


def _listings(one: Listing, other: Listing) -> Verdict:
    if one.ordered or other.ordered:
        return _in_order(one.items, other.items)
    relations = any(re.search(r"[<>]|\\[lg]e(?![A-Za-z])", item.text) for item in (*one.items, *other.items))
    if relations and one.alternatives != other.alternatives:
        return "different"
    return _in_any_order(one.items, other.items)


def _all(verdicts: Iterable[Verdict]) -> Verdict:
    worst: Verdict = "equal"
    for verdict in verdicts:
        if verdict == "different":
            return verdict
        worst = verdict if verdict == "unreadable" else worst
    return worst


def _in_order(one: tuple[Node, ...], other: tuple[Node, ...]) -> Verdict:
    if len(one) != len(other):
        return "different"
    return _all(_entries(a, b) for a, b in zip(one, other, strict=True))


def _in_any_order(one: tuple[Node, ...], other: tuple[Node, ...]) -> Verdict:
    """Each entry has its own partner; entries that were not read make the whole unreadable."""
    if len(one) != len(other):
        return "different"
    left, doubtful = list(other), False
    for item in one:
        verdicts = []
        for index, candidate in enumerate(left):
            verdicts.append(_entries(item, candidate))
            if verdicts[-1] == "equal":
                del left[index]
                break
        else:
            if "unreadable" not in verdicts:
                return "different"
            doubtful = True
    return "unreadable" if doubtful else "equal"


def _entries(one: Node, other: Node) -> Verdict:
    return _compare(one.text, other.text)


def _matrices(one: Node, other: Node) -> Verdict:
    if isinstance(one, Matrix) and isinstance(other, Matrix):
        if [len(row) for row in one.rows] != [len(row) for row in other.rows]:
            return "different"
        return _all(_in_order(a, b) for a, b in zip(one.rows, other.rows, strict=True))
    matrix, entries = (one, other) if isinstance(one, Matrix) else (other, one)
    assert isinstance(matrix, Matrix)
    if not isinstance(entries, Bracket) or entries.opened not in "([":
        return same_mathematics(one.text, other.text)
    vector = len(matrix.rows) == 1 or all(len(row) == 1 for row in matrix.rows)
    return _in_order(tuple(cell for row in matrix.rows for cell in row), entries.items) if vector else "different"


def _phrases(one: Node, other: Node) -> Verdict:
    """Two answers of which one at least has words: as quantities, or as the same words around the same mathematics."""
    quantities = [_quantity(one), _quantity(other)]
    if quantities[0] and quantities[1]:
        return _quantities(quantities[0], quantities[1])
    for quantity, plain_one in ((quantities[0], other), (quantities[1], one)):
        if quantity and isinstance(plain_one, Leaf) and not quantity.compound:
            return _bare(quantity, plain_one.text)
    if not (isinstance(one, Phrase) and isinstance(other, Phrase)):
        phrase, mathematics = (one, other) if isinstance(one, Phrase) else (other, one)
        parts = phrase.parts if isinstance(phrase, Phrase) else ()
        clear = number(mathematics.text) is not None and not any(isinstance(part, Leaf) for part in parts)
        return "different" if clear else "unreadable"
    if len(one.parts) != len(other.parts):
        return "different"
    return _all(_parts(a, b) for a, b in zip(one.parts, other.parts, strict=True))


def _parts(one: Leaf | tuple[str, ...], other: Leaf | tuple[str, ...]) -> Verdict:
    if isinstance(one, Leaf) and isinstance(other, Leaf):
        return same_mathematics(one.text, other.text)
    if isinstance(one, Leaf) or isinstance(other, Leaf):
        return "different"
    return "equal" if _words(one) == _words(other) else "different"


def _words(run: tuple[str, ...]) -> tuple[str, ...]:
    """Unit words by their unit, others in lower case."""
    named = (word.casefold() for word in run)
    return tuple(str(unit_of(word) or word) for word in named)


@lru_cache(maxsize=1024)
def _quantity(node: Node) -> _Quantity | None:
    """A number with a unit or with what is counted; several of one kind, such as `3 h 20 min`, are their sum."""
    if not isinstance(node, Phrase):
        return None
    parts = list(node.parts)
    if (
        len(parts) == 2
        and isinstance(parts[1], Leaf)
        and isinstance(parts[0], tuple)
        and len(parts[0]) == 1
        and unit_of(parts[0][0])
    ):
        parts.reverse()  # Rs 500
    if len(parts) % 2 or not all(isinstance(part, Leaf) == (index % 2 == 0) for index, part in enumerate(parts)):
        return None
    found = [_one_quantity(parts[index], parts[index + 1]) for index in range(0, len(parts), 2)]
    if len(found) == 1:
        return found[0]
    known = [one for one in found if one is not None]
    if (
        len(known) < len(found)
        or len({one.base for one in known}) > 1
        or len({one.factor for one in known}) < len(known)
    ):
        return None
    total = "+".join(rf"({one.value})\cdot({_latex(one.factor)})" for one in known)
    return _Quantity(total, known[0].base, Fraction(1), True)


def _one_quantity(value: Leaf | tuple[str, ...], words: Leaf | tuple[str, ...]) -> _Quantity | None:
    assert isinstance(value, Leaf)
    assert isinstance(words, tuple)
    if re.search(r"[=<>]|\\(?:le|ge|ne|in|approx)(?![A-Za-z])", value.text):
        return None
    text = value.text
    while words and words[0].casefold() in SCALES:
        text, words = rf"({text})\cdot {SCALES[words[0].casefold()]}", words[1:]
    if not words:
        return _Quantity(text, "", Fraction(1), False)
    lowered = [word.casefold() for word in words]
    if lowered[0] in NEVER_COUNTED or _HARD_WORDS & set(lowered[1:]) or {"equiv", "...", "mod"} & set(lowered):
        return None
    return _Quantity(text, *measure(words), False)


def _quantities(one: _Quantity, other: _Quantity) -> Verdict:
    if "" in (one.base, other.base):
        return same_mathematics(one.value, other.value)
    if one.base != other.base:
        return "different"
    if one.factor == other.factor:
        return same_mathematics(one.value, other.value)
    return same_mathematics(*(rf"({each.value})\cdot({_latex(each.factor)})" for each in (one, other)))


def _bare(quantity: _Quantity, value: str) -> Verdict:
    """A number without a unit stands for any unit; one percent is also 1/100."""
    verdict = same_mathematics(quantity.value, value)
    if verdict != "equal" and quantity.base == "1":
        return same_mathematics(rf"({quantity.value})\cdot({_latex(quantity.factor)})", value)
    return verdict


def _latex(factor: Fraction) -> str:
    return str(factor.numerator) if factor.denominator == 1 else rf"\frac{{{factor.numerator}}}{{{factor.denominator}}}"
