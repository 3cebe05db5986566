"""Numbers in one spelling: separators, exponents, mixed numbers, repeating decimals, bases, money and times."""

import re
from fractions import Fraction

from megatron_offgrpo.data.rules import Rules, applied, rules
from megatron_offgrpo.data.units import PARTS, unit_of

_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"
_FRACTION = r"\\frac\s*(?:{\s*(?P<a>\d+)\s*}|(?P<b>\d))\s*(?:{\s*(?P<c>\d+)\s*}|(?P<d>\d))"
_WHOLE = r"(?<![\d.\w^_}/])(?P<whole>\d+)"
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    " seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_CHINESE = "零一二三四五六七八九十"
_VALUES = {
    **{word: number for number, word in enumerate(_ONES.split())},
    **{word: 10 * number for number, word in enumerate(_TENS.split(), 2)},
    **{word: number for number, word in enumerate(_CHINESE)},
    "两": 2,
}
_BASES = {**_VALUES, "bin": 2, "oct": 8, "dec": 10, "hex": 16}
_ONE, _TEN = "|".join(reversed(_ONES.split())), "|".join(_TENS.split())
_POWERS = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NUMBER_WORD = rf"(?:{_TEN}|{_ONE}|{'|'.join(_POWERS)})(?![A-Za-z])"
_IN_WORDS = re.compile(
    rf"^(?:{_NUMBER_WORD}(?:(?:\s+and\s+|[\s-]+){_NUMBER_WORD})*|[{_CHINESE}两](?=\s*[个元人]|$))(?![A-Za-z])"
    rf"(?:-(?=(?:{'|'.join(PARTS)})(?![A-Za-z]))|(?!-[A-Za-z]))",
    re.IGNORECASE,
)
"""A number in words at the beginning of an answer, to its end; the dash of `two-thirds` belongs to it."""
_CURRENCIES = {
    r"\$": "usd", "€": "eur", "£": "gbp", "¥": "cny", "￥": "cny", "₹": "inr", "₩": "krw", "₽": "rub",
}  # fmt: skip
_SIGNS = "[€£¥￥₹₩₽]"
_THOUSANDS = re.compile(r"(?<![\d.,])([1-9]\d{0,2})((?:,\d{3})+)(?![\d,])(?!,\d)")
_BRACKET = re.compile(r"[(\[{][^()\[\]{}]*\d,\d{3}[^()\[\]{}]*[)\]}]")


def numbers(text: str) -> str:
    """`text` with its numbers as plain digits, fractions and `\\times 10^{...}`, and currencies as words after them."""
    return _IN_WORDS.sub(_number_of_words, applied(_RULES, _without_commas(text)).strip())


def _without_commas(text: str) -> str:
    """Commas between groups of three digits go, except where they separate the entries of a bracket, as in (5,100)."""
    in_brackets = _BRACKET.search(text)
    if in_brackets and ", " not in in_brackets.group():
        return text
    return _THOUSANDS.sub(lambda match: match[1] + match[2].replace(",", ""), text)


def _grouped(match: re.Match[str]) -> str:
    return match[1] + re.sub(r"\D", "", match[2])


def _power_of_ten(match: re.Match[str]) -> str:
    return rf"({match[1]}\times 10^{{{int(match[2])}}})"


def _mixed(match: re.Match[str]) -> str:
    """A whole number and a proper fraction side by side are their sum."""
    found = match.groupdict()
    upper, lower = found["a"] or found.get("b") or "", found["c"] or found.get("d") or ""
    if int(lower) == 0 or int(upper) >= int(lower):
        return match.group()
    return rf"({match['whole']}+\frac{{{upper}}}{{{lower}}})"


def _repeating(match: re.Match[str]) -> str:
    return _fraction(match["whole"], match["fixed"], match["period"])


def _dotted_period(match: re.Match[str]) -> str:
    """Dots over the first and the last digit of a period."""
    return _fraction(match["whole"], match["fixed"], match["first"] + match["middle"] + match["last"])


def _trailing_period(match: re.Match[str]) -> str:
    """0.333... and 0.1666...: what repeats at the end, if it stands there often enough to be a period."""
    whole, digits = match["whole"], match["digits"]
    for length in range(1, len(digits) // 2 + 1):
        period = digits[-length:]
        times = 1
        while digits[: -length * times].endswith(period):
            times += 1
        if times >= (3 if length == 1 else 2):
            return _fraction(whole, digits[: len(digits) - length * times], period)
    return match.group()


def _fraction(whole: str, fixed: str, period: str) -> str:
    """The fraction that is WHOLE.FIXED and then PERIOD for ever."""
    value = Fraction(f"{whole}.{fixed or 0}") + Fraction(int(period), 10 ** len(fixed) * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _based(match: re.Match[str]) -> str:
    """`DIGITS_{BASE}`; base ten is the ordinary one."""
    name = match["base"].strip().casefold()
    base = int(name) if name.isdigit() else _BASES.get(name, name)
    digits = match["digits"].lstrip("0") or "0"
    return digits if base == 10 else f"{digits}_{{{base}}}"


def _binary(match: re.Match[str]) -> str:
    return f"{match[1].lstrip('0') or '0'}_{{2}}"


def _money(match: re.Match[str]) -> str:
    return f" {match['number']} {_CURRENCIES[match['sign'].removeprefix('US').strip()]} "


def _currency(match: re.Match[str]) -> str:
    return f" {_CURRENCIES[match.group()]} "


def _half_of_day(match: re.Match[str]) -> str:
    return f" {(match[1] or match[2] or match[3]).lower()}m "


def _unit_in_brackets(match: re.Match[str]) -> str:
    return f" {match[1]}" if unit_of(match[1]) else match.group()


def _number_of_words(match: re.Match[str]) -> str:
    """The digits of a number in words; what is no number by the rules, such as `one and two`, stays as it is."""
    spoken = re.split(r"[\s-]+", match.group().casefold().rstrip("-"))
    value = _value(spoken)
    return match.group() if value is None else f"{value} "


def _value(spoken: list[str]) -> int | None:
    """Groups below a thousand, each with a smaller scale than the one before; `and` only behind a scale."""
    total, group, last_scale, room = 0, 0, 10**15, 10**3
    for place, word in enumerate(spoken):
        if word == "and":
            if spoken[place - 1] not in _POWERS:
                return None
        elif word == "hundred":
            if not 0 < group < 10:
                return None
            group, room = 100 * group, 100
        elif word in _POWERS:
            if not group or _POWERS[word] >= last_scale:
                return None
            total, last_scale, group, room = total + group * _POWERS[word], _POWERS[word], 0, 10**3
        else:
            value = _VALUES[word]
            if value >= room or (value == 0 and len(spoken) > 1):
                return None
            group, room = group + value, 10 if value >= 20 else 1
    return total + group


_RULES: Rules = rules(
    # Thousands: thin spaces, apostrophes, then plain blanks, when the other LaTeX spaces are blanks too.
    (r"(?<![\d.,])(\d{1,3})((?:(?:\\[,;: ]|~|'(?=\d{3}))\s*\d{3})+)(?!\d)", _grouped),
    (r"(?<!\\)\\[,;:> ]|(?<!\\)\\q?quad(?![A-Za-z])|(?<!\\)\\(?=\s)|~", " "),
    (r"(?<![\d.,\w])([1-9]\d{0,2})((?: \d{3})+)(?!\d)", _grouped),
    (rf"(?<![A-Za-z\\\d.])({_NUMBER})\s?[eE]([+-]?\d+)(?![\w.])", _power_of_ten),
    (r"\^\s*-\s*(\d+)", r"^{-\1}"),
    # Bases.
    (r"(?<![\w.}])0[bB]([01]+)(?!\w)", _binary),
    (
        r"(?<![\w.])\(?(?P<digits>\d[\dA-Fa-f]*)\)?\s*_\s*{?\s*\(?(?:base\s*)?"
        rf"(?P<base>\d+|{_ONE}|{_TEN})\)?\s*}}?(?!\w)",
        _based,
    ),
    (r"(?<![\w.])\(?(?P<digits>[A-Fa-f]*\d[\dA-Fa-f]*)\)?\s*_\s*{\s*(?P<base>\d\d)\s*}(?!\w)", _based),
    (r"(?<![\w.])(?P<digits>\d[\dA-Fa-f]*)\s*\(?\s*(?:in\s+)?base[\s-]*(?P<base>\d+|[a-z]+)\s*\)?", _based),
    # Repeating decimals.
    (
        r"(?P<whole>\d+)\.(?P<fixed>\d*)\\dot\s*{?\s*(?P<first>\d)\s*}?(?P<middle>\d*)\\dot\s*{?\s*(?P<last>\d)\s*}?",
        _dotted_period,
    ),
    (r"(?P<whole>\d+)\.(?P<fixed>\d*)\\(?:overline|bar|dot)\s*{?\s*(?P<period>\d+)\s*}?", _repeating),
    (r"(?<!\w)(?P<whole>\d+)\.(?P<fixed>\d*)\((?P<period>\d+)\)(?!\w)", _repeating),
    (r"(?P<whole>\d+)\.(?P<digits>\d+)\s*\\ldots", _trailing_period),
    # Mixed numbers.
    (_WHOLE + r"\s*" + _FRACTION, _mixed),
    (_WHOLE + r"\s+(?P<a>\d+)\s*/\s*(?P<c>\d+)(?![\d.])", _mixed),
    # Money.
    (rf"(?P<sign>(?:US\s*)?\\\$|{_SIGNS})\s*(?P<number>{_NUMBER}(?:[, ]\d{{3}})*(?:\.\d+)?)", _money),
    (rf"\\\$|{_SIGNS}", _currency),
    (r"\bRs\.?(?=\s*\d)", " inr "),
    (r"¢", " cent "),
    (r"(?<=\d)\s*\(\s*([^\W\d_]{2,})\s*\)\s*$", _unit_in_brackets),
    # Times of day.
    (r"(?<=\d)\s*(?:([apAP])\.\s?[mM]\b\.?|([ap])m\b|([AP])M\b)", _half_of_day),
    # An index or a power of one digit, before a blank that would part it from the next number.
    (r"([_^])\s*(\d)(?=\s)", r"\1{\2}"),
)
