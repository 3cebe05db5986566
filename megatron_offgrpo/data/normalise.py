"""Answers in one spelling, before anything reads them: the same rules for references and for solutions."""

import re
from collections.abc import Callable
from fractions import Fraction

from megatron_offgrpo.data.unicode_latex import as_latex
from megatron_offgrpo.data.units import unit_of

Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]

_GROUP = r"{((?:[^{}]|{(?:[^{}]|{[^{}]*})*})*)}"
"""Braces with up to two levels of braces inside."""
_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"
_FRAC = r"\\frac\s*(?:{\s*(\d+)\s*}|(\d))\s*(?:{\s*(\d+)\s*}|(\d))"
_BASE_NAMES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
               "twelve": 12, "sixteen": 16, "bin": 2, "oct": 8, "hex": 16, "dec": 10}  # fmt: skip
_CURRENCIES = {r"\$": "usd", "€": "eur", "£": "gbp", "¥": "cny", "￥": "cny", "₹": "inr", "₩": "krw", "₽": "rub"}


def _rules(*pairs: tuple[str, str | Callable[[re.Match[str]], str]]) -> tuple[Rule, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


def _mixed(match: re.Match[str]) -> str:
    whole, upper, lower = match["whole"], match["a"] or match["b"], match["c"] or match["d"]
    if int(lower) == 0 or int(upper) >= int(lower):
        return match.group()
    return rf"({whole}+\frac{{{upper}}}{{{lower}}})"


def _slashed(match: re.Match[str]) -> str:
    whole, upper, lower = match["whole"], match["a"], match["b"]
    if int(lower) == 0 or int(upper) >= int(lower):
        return match.group()
    return rf"({whole}+\frac{{{upper}}}{{{lower}}})"


def _fraction(whole: str, fixed: str, period: str) -> str:
    """The fraction that is WHOLE.FIXED and then PERIOD for ever."""
    value = Fraction(f"{whole}.{fixed or 0}") + Fraction(int(period), 10 ** len(fixed) * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _repeating(match: re.Match[str]) -> str:
    return _fraction(match["whole"], match["fixed"], match["period"])


def _dots(match: re.Match[str]) -> str:
    """Dots over the first and the last digit of a period."""
    return _fraction(match["whole"], match["fixed"], match["first"] + match["middle"] + match["last"])


def _dotted(match: re.Match[str]) -> str:
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


def _based(match: re.Match[str]) -> str:
    base = match["base"].strip().casefold()
    number = _BASE_NAMES.get(base) or (int(base) if base.isdigit() else base)
    digits = match["digits"].lstrip("0") or "0"
    return digits if number == 10 else f"{digits}_{{{number}}}"


def _lowered(formula: str) -> str:
    """`H2O` as `H_{2}O`."""
    return _FORMULA_INDEX.sub(r"_{\1}", formula)


def _money(match: re.Match[str]) -> str:
    return f" {match['number']} {_CURRENCIES[match['sign'].removeprefix('US').strip()]} "


_MARKUP = _rules(
    (r"(?<=[\w)])\*\*(?=[\w(])", "^"),
    (r"^\s*#+\s+", ""),
    (r"\*\*\s*([^*]+?)\s*\*\*", r" \1 "), (r"(?<!\w)__([^_]+)__(?!\w)", r"\1"), (r"(?<![\w*)}])\*(?=\S)([^*]+?)(?<=\S)\*(?![\w*({])", r"\1"),
    (r"`+([^`]+)`+", r"\1"), (r"</?answer>", " "),
)  # fmt: skip

_FORMULA_INDEX = re.compile(r"(?<=[A-Za-z)])(\d+)")
_FORMULA = re.compile(r"(?=.*\d)(?:\(?[A-Z][a-z]?\d*\)?\d*){2,}")
"""A chemical formula without its indices lowered."""

_COMMANDS = _rules(
    (r"\\\\(?=[A-Za-z])(?!.*\\begin)", r"\\"),
    (r"\\([dtc])frac(?![A-Za-z])", r"\\frac"), (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|phantom\s*{[^{}]*}|hspace\s*{[^{}]*})(?![A-Za-z])\.?", " "),
    (r"\\[!]", ""), (r"{\s*,\s*}", r"\\,"),
    (r"\\(?:mathopen|mathclose|mathrel|mathord|mathbin|mathpunct)(?![A-Za-z])", ""),
    (r"\\(?:var)?nothing(?![A-Za-z])|\\varnothing(?![A-Za-z])|\\O(?![A-Za-z])", r"\\emptyset "), (r"\\{\s*\\}|^\s*{\s*}\s*$", r"\\emptyset "),
    (r"\\leq(?:slant)?(?![A-Za-z])|\\leqq(?![A-Za-z])|<=", r"\\le "), (r"\\geq(?:slant)?(?![A-Za-z])|\\geqq(?![A-Za-z])|>=", r"\\ge "),
    (r"\\neq(?![A-Za-z])|\\not\s*=|!=", r"\\ne "), (r"\\lt(?![A-Za-z])", "<"), (r"\\gt(?![A-Za-z])", ">"),
    (r"\\(?:dots[cbmio]?|cdots|ldots|vdots|ddots|dotso)(?![A-Za-z])|\.{3,}", r" \\ldots "),
    (r"\\lbrace(?![A-Za-z])", r"\\{"), (r"\\rbrace(?![A-Za-z])", r"\\}"), (r"\\lbrack(?![A-Za-z])", "["), (r"\\rbrack(?![A-Za-z])", "]"),
    (r"\\(?:mid|vert)(?![A-Za-z])", "|"), (r"\\(?:colon)(?![A-Za-z])", ":"), 
    (r"\\(?:textperthousand|permil)(?![A-Za-z])|‰", " permille "), (r"\\?%", " percent "),
    (r"\\textdegree(?![A-Za-z])|\\?degree(?![A-Za-z])|\^\s*{?\s*\\circ\s*}?", r" \\degree "), (r"\\degree\s*(?:\\(?:text|mathrm)\s*{\s*)?([CF])\b\s*}?", lambda match: {"C": " celsius ", "F": " fahrenheit "}[match[1]]),
    (r"(?<=\\degree) *(\d+(?:\.\d+)?)\s*(?:''|\"|\^{?\\prime\\prime}?)", r" \1 arcsecond "),
    (r"(?<=\\degree) *(\d+(?:\.\d+)?)\s*(?:'|\^{?\\prime}?)", r" \1 arcminute "), (r"(?<=arcminute) *(\d+(?:\.\d+)?)\s*(?:''|\"|\^{?\\prime\\prime}?)", r" \1 arcsecond "),
    (r"\\degree", " degree "), (r"(\d)\s*(?:''|\")(?!\w)", r"\1 in "), (r"^(\s*\d+)\s*'(?=\s*\d{1,2}(?!\d)|\s*$)", r"\1 ft "),
    (r"\\(?:p|b|)mod(?![A-Za-z])\s*" + _GROUP, r" mod \1 "), (r"\\(?:p|b|)mod(?![A-Za-z])", " mod "),
    (r"\\ce\s*" + _GROUP, lambda match: " " + _lowered(match[1]) + " "),
    (r"[(\[]\s*\\begin\s*{array}(?:\s*{[^}]*})?(.*?)\\end\s*{array}\s*[)\]]", r"\\begin{pmatrix}\1\\end{pmatrix}"),
    (r"(\\{\s*\(?[A-Za-z][^{}|:\d]*):", r"\1|"),
    (r"¢", " cent "), (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)|(?<=\d)\s+[xX]\s+(?=\d)", r" \\times "),
    (r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"), (r"(?<![A-Za-z\\])(?:infinity|infty)(?![A-Za-z])", r"\\infty "),
    (r"(?<![A-Za-z\\])(pi|sin|cos|tan|cot|sec|csc|log|ln|exp|arcsin|arccos|arctan|sinh|cosh|tanh)(?![A-Za-z])", r"\\\1 "),
    (r"(1\s*\^?{?\s*st|2\s*\^?{?\s*nd|3\s*\^?{?\s*rd|\d\s*\^?{?\s*(?:\\(?:text|mathrm)\s*{\s*)?th)(?![A-Za-z])\s*}*", lambda match: f"{match[1][0]} th "),
)  # fmt: skip
_TEXTS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|mathrm|mathbf|mathit|mathsf|mathtt|boldsymbol|bm|mbox|hbox|emph|underline|operatorname\*?|fbox|boxed)\s*"
    + _GROUP
)
_FUNCTION_NAMES = frozenset(
    "lcm gcd max min sin cos tan arcsin arccos arctan log ln exp det tr rank sgn sign arg Re Im".split()
)

_NUMBERS = _rules(
    (r"\\mod|\(\s*mod\s+([^()]*)\)", r" mod \1 "),
    (r"(?<![\d.,])(\d{1,3})((?:(?:\\[,;: ]|~|\u2019|(?<=\d)'(?=\d{3}))\s*\d{3})+)(?!\d)", lambda match: match[1] + re.sub(r"\D", "", match[2])),
    (r"(?<!\\)\\[,;:> ]|(?<!\\)\\q?quad(?![A-Za-z])|(?<!\\)\\(?=\s)|~", " "),
    (r"(?<![\d.,\w])([1-9]\d{0,2})((?: \d{3})+)(?![\d])", lambda match: match[1] + match[2].replace(" ", "")),
    (r"(?<![A-Za-z\\\d.])(" + _NUMBER + r")\s?[eE]([+-]?\d+)(?![\w.])", lambda match: rf"({match[1]}\times 10^{{{int(match[2])}}})"),
    (r"(?<![\w.}])(?P<digits>0[bB][01]+)(?!\w)", lambda match: f"{match[1][2:].lstrip('0') or '0'}_{{2}}"),
    (r"(?<![\w.])\(?(?P<digits>\d[\dA-Fa-f]*)\)?\s*_\s*{?\s*\(?(?:base\s*)?(?P<base>\d+|two|three|four|five|six|seven|eight|nine|ten|twelve|sixteen)\)?\s*}?(?!\w)", _based),
    (r"(?<![\w.])\(?(?P<digits>[A-Fa-f]*\d[\dA-Fa-f]*)\)?\s*_\s*{\s*(?P<base>\d\d)\s*}(?!\w)", _based),
    (r"(?<![\w.])(?P<digits>\d[\dA-Fa-f]*)\s*\(?\s*(?:in\s+)?base[\s-]*(?P<base>\d+|[a-z]+)\s*\)?", _based),
    (r"(?P<whole>\d+)\.(?P<fixed>\d*)\\dot\s*{?\s*(?P<first>\d)\s*}?(?P<middle>\d*)\\dot\s*{?\s*(?P<last>\d)\s*}?", _dots),
    (r"(?P<whole>\d+)\.(?P<fixed>\d*)\\(?:overline|bar|dot)\s*{?\s*(?P<period>\d+)\s*}?", _repeating),
    (r"(?<!\w)(?P<whole>\d+)\.(?P<fixed>\d*)\((?P<period>\d+)\)(?!\w)", _repeating),
    (r"(?P<whole>\d+)\.(?P<digits>\d+)\s*\\ldots", _dotted),
    (r"(?<![\d.\w^_}/])(?P<whole>\d+)\s*" + _FRAC.replace(r"(\d+)", r"(?P<a>\d+)", 1).replace(r"(\d)", r"(?P<b>\d)", 1).replace(r"(\d+)", r"(?P<c>\d+)", 1).replace(r"(\d)", r"(?P<d>\d)", 1), _mixed),
    (r"(?<![\d.\w^_}/])(?P<whole>\d+)\s+(?P<a>\d+)\s*/\s*(?P<b>\d+)(?![\d.])", _slashed),
    (r"(?P<sign>(?:US\s*)?\\\$|[€£¥￥₹₩₽])\s*(?P<number>" + _NUMBER + r"(?:[, ]\d{3})*(?:\.\d+)?)", _money),
    (r"\\\$", " usd "), (r"€", " eur "), (r"£", " gbp "), (r"[¥￥]", " cny "), (r"₹", " inr "),
    (r"(?<=\d)\s*(?:([apAP])\.\s?[mM]\b\.?|([ap])m\b|([AP])M\b)", lambda match: f" {(match[1] or match[2] or match[3]).lower()}m "),
    (r"\bRs\.?(?=\s*\d)", " inr "), (r"([_^])\s*(\d)(?=\s)", r"\1{\2}"), (r"\^\s*-\s*(\d+)", r"^{-\1}"),
    (r"(?<=\d)\s*\(\s*([^\W\d_]{2,})\s*\)\s*$", lambda match: f" {match[1]}" if unit_of(match[1]) else match.group()),
)  # fmt: skip
_THOUSANDS = re.compile(r"(?<![\d.,])([1-9]\d{0,2})((?:,\d{3})+)(?![\d,])(?!,\d)")
_PREFIX = re.compile(
    r"^\s*(?:(?:so|thus|hence|therefore|and)\b[,:]?\s*)?(?:the\s+)?(?:(?:final|correct|right|only)\s+)?(?:answer|result|ans|solution|choice)s?\s*(?:(?:is|are)\b\s*:?|[:=])\s*"
    r"|^\s*(?:所以|因此|故)?\s*(?:最终|正确)?(?:答案|结果|答)\s*(?:应?为|应?是|等于)?\s*[:：=]?\s*"
    r"|^\s*(?:approximately|about|exactly|equals?|is|约为?|大约|\\approx|\\therefore|=(?!=))\s*:?\s*(?=\S)",
    re.IGNORECASE,
)  # fmt: skip
_UNIT_FRACTION = re.compile(r"\\frac\s*{\s*([A-Za-z]+)\s*}\s*{\s*([A-Za-z]+)\s*}")
_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBER_WORDS = {word: number for number, word in enumerate(_ONES.split())} | {
    word: 10 * number for number, word in enumerate(_TENS.split(), 2)
}
_NUMBER_WORDS |= {word: number for number, word in enumerate("零一二三四五六七八九十")} | {"两": 2}
_NUMBER_WORD = re.compile(
    rf"^((?:{'|'.join(_TENS.split())})(?:[\s-](?:{'|'.join(_ONES.split()[1:10])}))?|{'|'.join(reversed(_ONES.split()))}|[零一二三四五六七八九十两](?=\s*[个元人]|$))(?![A-Za-z])",
    re.IGNORECASE,
)
"""A number in words at the beginning of an answer."""
_DELIMITERS = re.compile(r"\\[()\[\]]|\$\$")
_MAX_CHARACTERS = 2000


def plain(text: str) -> str:
    """`text` in one spelling: LaTeX in ASCII, numbers without separators, units as words, nothing that is dress alone.

    The result keeps every number, word and sign of the text that could distinguish two answers.
    """
    text = as_latex(text[:_MAX_CHARACTERS])
    for _ in range(3):  # a prefix may stand inside emphasis, emphasis inside a prefix
        before = text
        text = _applied(_MARKUP, text.strip())
        text = _PREFIX.sub("", text, count=1)
        text = _without_stop(text.strip())
        if text == before:
            break
    text = _without_dollars(_DELIMITERS.sub(" ", text))
    text = _applied(_COMMANDS, text)
    while True:
        unwrapped = _TEXTS.sub(_unwrapped, text)
        if unwrapped == text:
            break
        text = unwrapped
    text = _PREFIX.sub("", text, count=1)
    text = _applied(_NUMBERS, _comma_thousands(text))
    text = _without_stop(" ".join(_UNIT_FRACTION.sub(_unit_quotient, text).split()))
    text = _lowered(text) if _FORMULA.fullmatch(text) else text
    return _NUMBER_WORD.sub(_number_of_words, text)


def _unit_quotient(match: re.Match[str]) -> str:
    """`\frac{km}{h}` as `km/h`; of single letters, as in `\frac{m}{s}`, it may be algebra."""
    upper, lower = match[1], match[2]
    are_units = unit_of(upper) is not None and unit_of(lower) is not None and len(upper + lower) > 2
    return f" {upper}/{lower}" if are_units else match.group()


def _number_of_words(match: re.Match[str]) -> str:
    return str(sum(_NUMBER_WORDS[word] for word in re.split(r"[\s-]+", match[1].casefold())))


def _applied(rules: tuple[Rule, ...], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _unwrapped(match: re.Match[str]) -> str:
    inner = match[1]
    if inner.strip() in _FUNCTION_NAMES:
        return rf"\operatorname {{{inner.strip()}}}" if inner.strip() in ("lcm", "gcd") else rf"\{inner.strip()} "
    before = match.string[: match.start()].rstrip()
    return inner if before.endswith(("_", "^", "_{", "^{")) else f" {inner} "


def _without_dollars(text: str) -> str:
    r"""Dollars that delimit go; one alone before a number is money, `\$`."""
    bare = re.findall(r"(?<!\\)\$", text)
    if len(bare) == 1:
        text = re.sub(r"(?<!\\)\$\s*(?=[\d.])", r"\\$", text)
    return re.sub(r"(?<!\\)\$", " ", text)


def _comma_thousands(text: str) -> str:
    """Commas between groups of three digits go, except where they separate the entries of a bracket, as in (5,100)."""
    in_brackets = re.search(r"[(\[{][^()\[\]{}]*\d,\d{3}[^()\[\]{}]*[)\]}]", text)
    if in_brackets and ", " not in in_brackets.group():
        return text
    return _THOUSANDS.sub(lambda match: match[1] + match[2].replace(",", ""), text)


def _without_stop(text: str) -> str:
    while text.endswith((".", "!", ",", ";", ":")) and not text.endswith("...") and len(text) > 1:
        if text.endswith("!") or re.search(r"(?:^|[\s.])[A-Za-z]\.[A-Za-z]\.$", text):
            break
        text = text[:-1].rstrip()
    return text
