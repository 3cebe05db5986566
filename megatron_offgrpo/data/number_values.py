"""Plain numbers: their exact values, and when a decimal stands for another number."""

import re
from decimal import Decimal
from fractions import Fraction

_NUMBER = re.compile(r"([+-]?)\s*(?:(\d+(?:\.\d*)?|\.\d+)|\\frac\s*{\s*(-?\d+)\s*}\s*{\s*(\d+)\s*}|(\d+)\s*/\s*(\d+))")
_DECIMAL = re.compile(r"[+-]?\s*\d*\.(\d+)")
_SAME_DIGITS = 6
"""Decimals from which on a rounded decimal stands for the exact value."""
_FLOAT_DIGITS = 15
"""Digits that a 64-bit float keeps; `0.30000000000000004` has more, and means 0.3."""


def number(text: str) -> Fraction | None:
    """The value of a plain number: an integer, a decimal, a fraction of integers."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    sign, plain, upper, lower, left, right = match.groups()
    if plain is not None:
        value = Fraction(plain.rstrip(".") or 0)
    else:
        divisor = int(lower or right)
        if divisor == 0:
            return None
        value = Fraction(int(upper or left), divisor)
    return -value if sign == "-" else value


def same_number(one: str, first: Fraction, other: str, second: Fraction) -> bool:
    """Whether two plain numbers, as text and value, are one: exactly, rounded from six places on, or as floats."""
    if first == second or rounds(one, first, second) or rounds(other, second, first):
        return True
    return _is_float(one, first) != _is_float(other, second) and _to_float_digits(first) == _to_float_digits(second)


def _is_float(text: str, value: Fraction) -> bool:
    """Whether `text` is a decimal with more digits than a float keeps, six of those that it keeps behind the point."""
    match = _DECIMAL.fullmatch(text.strip())
    return match is not None and abs(value) < 10**9 and abs(value) * 10 ** len(match[1]) >= 10**_FLOAT_DIGITS


def _to_float_digits(value: Fraction) -> Fraction:
    return Fraction(f"{Decimal(value.numerator) / Decimal(value.denominator):.{_FLOAT_DIGITS - 1}e}")


def rounds(text: str, decimal: Fraction, exact: Fraction) -> bool:
    """Whether `text`, a decimal with six places and five digits or more, is `exact` rounded or cut there."""
    match = _DECIMAL.fullmatch(text.strip())
    if match is None or len(match[1]) < _SAME_DIGITS:
        return False
    scale = 10 ** len(match[1])
    if abs(decimal) * scale < 10**4:
        return False
    scaled = abs(exact) * scale
    return (decimal < 0) == (exact < 0) and abs(decimal) * scale in (
        round(scaled),
        scaled.numerator // scaled.denominator,
    )
