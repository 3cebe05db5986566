"""math-verify, asked about mathematics without words, and believed only where it read all of it."""

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

from latex2sympy2_extended import NormalizationConfig
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy, normalize_latex
from math_verify import verify
from math_verify.grader import is_equation, should_treat_as_complex
from sympy import Basic, Expr, Float, I, Integral, MatrixBase, Product, Rational, Set, Sum, Symbol, Union, nan, zoo
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from megatron_offgrpo.data.number_values import number, rounds, same_number

Verdict = Literal["equal", "different", "unreadable"]

_SPELLING = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)
_READING = ConversionConfig(lowercase_symbols=False)
"""`R` and `r` are two names; math-verify's own `parse` takes them for one."""
# What math-verify reads in part, or as something else than it means.
_MISREAD = re.compile(
    r"\d\s*_|\)\s*_|'|\\prime|!\s*!|\d\s+[\d.]|\d{4}-\d\d?-\d\d?|^\d\d?/\d\d?/\d{2,4}$|\\text|\\frac\s*{\s*d\s*[A-Za-z]?\s*}\s*{\s*d\s*[A-Za-z]\s*}|[^\x00-\x7f]"
    r"|^\s*\([a-hivx]{1,4}\)\s*\S.*\([a-hivx]{1,4}\)"
    r"|^(?:\\mathrm)?{?(?=.*_)(?:[A-Z][a-z]?\s*(?:_\s*(?:\d|{\s*\d+\s*}))?\s*){2,}}?$"
)
_LETTER_DIGIT = re.compile(r"(?<![_^{A-Za-z])[A-Za-z]\s*\d+(?![\d.]|\s*\^)")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_LONG_RUN = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{4,}")
_RANGE = re.compile(r"\s*(\d+)\s*-\s*(\d+)\s*")
_CLOCK = re.compile(r"\d{1,2}(?::[0-5]\d){1,2}")
_RATIO = re.compile(r"[^:]+(?::[^:]+){2,}")
_IMAGINARY = re.compile(r"(?<=\d)i(?![A-Za-z])")
_LETTER = re.compile(r"\\Gamma\s*\(|\\gamma(?![A-Za-z])|\\Gamma(?![A-Za-z])|\\[A-Za-z]+|[IT]")
"""What latex2sympy takes for i, for the constant 0.577..., and for a transposition, which it drops."""
_TOKENS = re.compile(r"\\[A-Za-z]+|\d+(?:\.\d+)?|[A-Za-z]|.", re.DOTALL)
_DIGITS = 60
"""Digits to which math-verify compares: it takes a difference below 10 to the minus this as none."""
_KEPT_BLANK = re.compile(r"(?<=[A-Za-z])\s+(?=[A-Za-z])|(?<=[\d.])\s+(?=[\d.])")


def squeezed(text: str) -> str:
    """`text` without blanks and without braces around one sign."""
    text = re.sub(r"{\s*([A-Za-z0-9])\s*}", r"\1", _KEPT_BLANK.sub("\x00", text))
    return re.sub(r"\s+", "", text).replace("\x00", " ")


@lru_cache(maxsize=4096)
def same_mathematics(one: str, other: str) -> Verdict:
    """Whether two texts without words mean the same number, expression, set or relation."""
    if squeezed(one) == squeezed(other):
        return "equal"
    if len(one) > 1000 or len(other) > 1000:
        return "unreadable"
    first, second = number(one), number(other)
    if first is not None and second is not None:
        return _decided(same_number(one, first, other, second))
    for special in (_same_range, _same_clock, _same_ratio):
        found = special(one, other)
        if found is not None:
            return _decided(found)
    left, right = read(one), read(other)
    if left is None or right is None:
        return "unreadable"
    if not _equal(left, right, one, other):
        return "different"
    return "equal" if _read_whole(one) and _read_whole(other) else "unreadable"


def same_set(relations: tuple[str, ...], other: str) -> Verdict:
    """Whether the numbers that satisfy one or another of `relations` are the set `other`."""
    parts, whole = [read(relation) for relation in relations], read(other)
    if (
        whole is None
        or any(part is None for part in parts)
        or not all(_read_whole(text) for text in (*relations, other))
    ):
        return "unreadable"
    union = _attempt(lambda: Union(*(part.as_set() for part in parts)))  # type: ignore[union-attr]
    return "unreadable" if union is None else _decided(_verified(union, whole))


def _decided(equal: bool) -> Verdict:
    return "equal" if equal else "different"


def _same_range(one: str, other: str) -> bool | None:
    """Two whole numbers with a dash between, the smaller one first, are a range and no difference."""
    ranges = [(int(match[1]), int(match[2])) for match in (_RANGE.fullmatch(one), _RANGE.fullmatch(other)) if match]
    if all(low >= high for low, high in ranges):
        return None
    return len(ranges) == 2 and ranges[0] == ranges[1]


def _same_clock(one: str, other: str) -> bool | None:
    """Two times of day are compared field by field; `12:15` against `4:5` is a ratio."""
    clocks = [match.group() for match in (_CLOCK.fullmatch(squeezed(one)), _CLOCK.fullmatch(squeezed(other))) if match]
    if len(clocks) < 2:
        return None
    first, second = ([int(field) for field in clock.split(":")] for clock in clocks)
    return first == second


def _same_ratio(one: str, other: str) -> bool | None:
    """Ratios of three and more terms are proportional or not."""
    if not _RATIO.fullmatch(one) and not _RATIO.fullmatch(other):
        return None
    first, second = ([number(term) for term in text.split(":")] for text in (one, other))
    if len(first) != len(second) or None in first or None in second or not first[0] or not second[0]:
        return False
    return all(a * second[0] == b * first[0] for a, b in zip(first, second, strict=True))  # type: ignore[operator]


def misread(text: str) -> bool:
    """Whether math-verify is known to read `text` in part or as something else."""
    bare = _COMMAND.sub("#", text)
    return bool(_MISREAD.search(text) or _LETTER_DIGIT.search(bare) or _LONG_RUN.search(bare))


@lru_cache(maxsize=4096)
def read(text: str) -> Any | None:
    """The expression that math-verify reads; None where it cannot read all of it."""
    return None if misread(text) else _parsed(text)


def _parsed(text: str) -> Any | None:
    try:
        spaced = _IMAGINARY.sub(" i", text)  # math-verify takes the i of `2i` for another one than that of `2 i`
        latex = _LETTER.sub(_as_letter, normalize_latex(spaced, _SPELLING))
        found = latex2sympy(
            latex,
            is_real=not should_treat_as_complex(latex),
            convert_degrees=False,
            normalization_config=None,
            conversion_config=_READING,
        )
    except MemoryError:
        raise
    except Exception:  # math-verify's parser raises whatever its grammar and sympy raise on text that is no mathematics
        return None
    return _exact(found)


def _as_letter(match: re.Match[str]) -> str:
    """The letter so that latex2sympy reads it as a name; other commands as they are."""
    text = match.group()
    return rf"\mathit{{{text}}}" if text in ("I", "T", r"\gamma", r"\Gamma") else text


def _exact(expression: Any) -> Any:
    """The expression with its decimals as fractions, which have no rounding to be tolerant of, and i as the number."""
    if not isinstance(expression, Basic | MatrixBase):
        return expression
    exact: dict[Any, Any] = {one: Rational(str(one)) for one in expression.atoms(Float)}
    if isinstance(expression, Expr) and not expression.has(Sum, Product, Integral):
        exact |= {one: I for one in expression.atoms(Symbol) if one.name == "i"}
    return expression.xreplace(exact) if exact else expression


@lru_cache(maxsize=1024)
def _read_whole(text: str) -> bool:
    """Whether every number and letter of `text` matters to what was read: another one must give another expression."""
    if number(text) is not None:
        return True
    expression = read(text)
    return all(_parsed(changed) != expression for changed in _changes(text))


def _changes(text: str) -> Iterator[str]:
    tokens = _TOKENS.findall(text)
    fresh = next(letter for letter in "wvujkqrz" if letter not in tokens)
    for index, token in enumerate(tokens):
        if token[0].isdigit():
            other = str(int(float(token)) + 7) if len(token) < 15 else token[:-1] + str((int(token[-1]) + 1) % 10)
        elif len(token) == 1 and token.isalpha() and token not in "ei" and not _in_environment(tokens, index):
            other = fresh
        else:
            continue
        yield "".join([*tokens[:index], other, *tokens[index + 1 :]])


def _in_environment(tokens: list[str], index: int) -> bool:
    """Whether a letter belongs to the name behind a begin, end, mathbb or operatorname."""
    before = "".join(tokens[max(0, index - 16) : index])
    return bool(re.search(r"\\(?:begin|end|mathbb|mathcal|operatorname)\s*{[A-Za-z]*$", before))


def _equal(left: Any, right: Any, one: str, other: str) -> bool:
    """Whether math-verify says so, numbers compared by us: relatively, where it rounds to 6 or 15 decimals."""
    numeric = _numeric(left, one, right, other)
    if numeric is not None:
        return numeric
    if _without_symbols(left) and _without_symbols(right):
        return False  # 1=1 and 2=2 are both true, and say different things
    if any(isinstance(relation, Relational) and relation.lhs == relation.rhs for relation in (left, right)):
        return False
    equations = [is_equation(left), is_equation(right)]
    if any(equations) and (not all(equations) or left.free_symbols != right.free_symbols):
        return False  # math-verify drops the left side of x+y=1 beside 1
    if isinstance(left, Expr) and isinstance(right, Expr) and left.free_symbols != right.free_symbols:
        return False
    return _verified(left, right) or (isinstance(left, Set) and not isinstance(right, Set) and _verified(right, left))


def _verified(left: Any, right: Any) -> bool:
    return bool(
        _attempt(lambda: verify(left, right, numeric_precision=_DIGITS, timeout_seconds=None, raise_on_error=True))
    )


def _without_symbols(expression: Any) -> bool:
    return isinstance(expression, Boolean) and not expression.free_symbols


def _numeric(left: Any, one: str, right: Any, other: str) -> bool | None:
    """The comparison of two numbers; None where one of them is none."""
    first, second = _attempt(lambda: _value(left)), _attempt(lambda: _value(right))
    if first is None or second is None:
        return None
    if first == second:
        return True
    if not first or not second:
        return False
    if not (first.is_Rational and second.is_Rational) and abs(first - second) <= abs(first) * 10**-30:
        return True
    if not (first.is_real and second.is_real):
        return False
    return any(
        plain is not None and rounds(text, plain, _as_fraction(value))
        for text, plain, value in ((one, number(one), second), (other, number(other), first))
    )


def _as_fraction(value: Any) -> Fraction:
    return Fraction(value.p, value.q) if value.is_Rational else Fraction(str(value))


def _value(expression: Any) -> Any | None:
    """A finite number, exactly where it is rational, else to 50 digits."""
    if not isinstance(expression, Expr) or expression.free_symbols:
        return None
    done = expression.doit()
    if not done.is_number or done.is_finite is False or done in (nan, zoo):
        return None
    return done if done.is_Rational else done.evalf(50)


def _attempt(function: Callable[[], Any]) -> Any | None:
    try:
        return function()
    except MemoryError:
        raise
    except Exception:  # sympy raises on comparisons and values that it cannot make
        return None
