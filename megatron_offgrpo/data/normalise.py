"""Answers in one spelling, before anything reads them: the same rules for references and for solutions."""

import re

from megatron_offgrpo.data.number_spelling import numbers
from megatron_offgrpo.data.rules import END, GROUP, Rules, applied, rules, words
from megatron_offgrpo.data.unicode_latex import as_latex
from megatron_offgrpo.data.units import unit_of

_EMPHASIS: Rules = rules(
    (r"(?<=[\w)])\*\*(?=[\w(])", "^"),  # a power, as Python writes it
    (r"^\s*#+\s+", ""),
    (r"\*\*\s*([^*]+?)\s*\*\*", r" \1 "),
    (r"(?<!\w)__([^_]+)__(?!\w)", r"\1"),
    (r"(?<![\w*)}])\*(?=\S)([^*]+?)(?<=\S)\*(?![\w*({])", r"\1"),
    (r"`+([^`]+)`+", r"\1"),
    (r"</?answer>", " "),
)
_SECONDS = r"(?:''|\"|\^{?\\prime\\prime}?)"
_MINUTES = r"(?:'|\^{?\\prime}?)"
_FORMULA_INDEX = re.compile(r"(?<=[A-Za-z)])(\d+)")
_FORMULA = re.compile(r"(?=.*\d)(?:\(?[A-Z][a-z]?\d*\)?\d*){2,}")
"""A chemical formula without its indices lowered."""


def _lowered(formula: str) -> str:
    """`H2O` as `H_{2}O`."""
    return _FORMULA_INDEX.sub(r"_{\1}", formula)


def _formula(match: re.Match[str]) -> str:
    return f" {_lowered(match[1])} "


def _temperature(match: re.Match[str]) -> str:
    return {"C": " celsius ", "F": " fahrenheit "}[match[1]]


def _ordinal(match: re.Match[str]) -> str:
    return f"{match[1][0]} th "


_COMMANDS: Rules = rules(
    (r"\\\\(?=[A-Za-z])(?!.*\\begin)", r"\\"),
    (rf"\\[dtc]frac{END}", r"\\frac"),
    (rf"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits){END}\.?", " "),
    (rf"\\[hv]?phantom\s*{GROUP}|\\hspace\s*{GROUP}", " "),
    (r"\\!", ""),
    (r"{\s*,\s*}", r"\\,"),
    (rf"\\math(?:open|close|rel|ord|bin|punct){END}", ""),
    # Synonyms.
    (rf"\\(?:var)?nothing{END}|\\O{END}|\\{{\s*\\}}|^\s*{{\s*}}\s*$", r"\\emptyset "),
    (rf"\\leq(?:slant|q)?{END}|<=", r"\\le "),
    (rf"\\geq(?:slant|q)?{END}|>=", r"\\ge "),
    (rf"\\neq{END}|\\not\s*=|!=", r"\\ne "),
    (rf"\\lt{END}", "<"),
    (rf"\\gt{END}", ">"),
    (rf"\\(?:dots[cbmio]?|[clvd]dots){END}|\.{{3,}}", r" \\ldots "),
    (rf"\\lbrace{END}", r"\\{"),
    (rf"\\rbrace{END}", r"\\}"),
    (rf"\\lbrack{END}", "["),
    (rf"\\rbrack{END}", "]"),
    (rf"\\(?:mid|vert){END}", "|"),
    (rf"\\colon{END}", ":"),
    (r"(\\{\s*\(?[A-Za-z][^{}|:\d]*):", r"\1|"),
    (
        r"[(\[]\s*\\begin\s*{array}(?:\s*{[^}]*})?(.*?)\\end\s*{array}\s*[)\]]",
        r"\\begin{pmatrix}\1\\end{pmatrix}",
    ),
    (rf"\\(?:p|b)?mod{END}\s*{GROUP}", r" mod \1 "),
    (rf"\\(?:p|b)?mod{END}", " mod "),
    # Units that are signs.
    (rf"\\(?:textperthousand|permil){END}|‰", " permille "),
    (r"\\?%", " percent "),
    (rf"\\textdegree{END}|\\?degree{END}|\^\s*{{?\s*\\circ\s*}}?", r" \\degree "),
    (r"\\degree\s*(?:\\(?:text|mathrm)\s*{\s*)?([CF])\b\s*}?", _temperature),
    (rf"(?<=\\degree) *(\d+(?:\.\d+)?)\s*{_SECONDS}", r" \1 arcsecond "),
    (rf"(?<=\\degree) *(\d+(?:\.\d+)?)\s*{_MINUTES}", r" \1 arcminute "),
    (rf"(?<=arcminute) *(\d+(?:\.\d+)?)\s*{_SECONDS}", r" \1 arcsecond "),
    (r"\\degree", " degree "),
    (r"(\d)\s*(?:''|\")(?!\w)", r"\1 in "),
    (r"^(\s*\d+)\s*'(?=\s*\d{1,2}(?!\d)|\s*$)", r"\1 ft "),
    (
        rf"(1\s*\^?{{?\s*st|2\s*\^?{{?\s*nd|3\s*\^?{{?\s*rd|\d\s*\^?{{?\s*(?:\\(?:text|mathrm)\s*{{\s*)?th){END}\s*}}*",
        _ordinal,
    ),
    # What is written without a backslash.
    (rf"\\ce\s*{GROUP}", _formula),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)|(?<=\d)\s+[xX]\s+(?=\d)", r" \\times "),
    (r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (rf"(?<![A-Za-z\\])(?:infinity|infty){END}", r"\\infty "),
    (rf"(?<![A-Za-z\\])(pi|(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|log|ln|exp){END}", r"\\\1 "),
)
_TEXTS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|math(?:rm|bf|it|sf|tt)|boldsymbol|bm|[mhf]box|boxed|emph|underline"
    rf"|operatorname\*?)\s*{GROUP}"
)
_TWO_LETTERS_OF_TEXT = re.compile(r"\s*\\text[a-z]*\s*{\s*([A-Za-z])([A-Za-z])\s*}\s*")
_FUNCTION_NAMES = words("lcm gcd max min sin cos tan arcsin arccos arctan log ln exp det tr rank sgn sign arg Re Im")
_UNIT_FRACTION = re.compile(r"\\frac\s*{\s*([A-Za-z]+)\s*}\s*{\s*([A-Za-z]+)\s*}")
_PREFIX = re.compile(
    r"^\s*(?:(?:so|thus|hence|therefore|and)\b[,:]?\s*)?(?:the\s+)?(?:(?:final|correct|right|only)\s+)?"
    r"(?:answer|result|ans|solution|choice)s?\s*(?:(?:is|are)\b\s*:?|[:=])\s*"
    r"|^\s*(?:所以|因此|故)?\s*(?:最终|正确)?(?:答案|结果|答)\s*(?:应?为|应?是|等于)?\s*[:：=]?\s*"
    r"|^\s*(?:approximately|about|exactly|equals?|is|约为?|大约|\\approx|\\therefore|=(?!=))\s*:?\s*(?=\S)",
    re.IGNORECASE,
)
"""What announces an answer, and says nothing of it."""
_MODULUS = re.compile(r"\(\s*mod\s+([^()]*)\)")
_DELIMITERS = re.compile(r"\\[()\[\]]|\$\$")
_TRAILING_SPACE = re.compile(r"(?:[\s~\\]|(?<=\\)[,;:!>])+$")
"""Spaces of LaTeX at the end, the backslash of one that was cut off, and line breaks."""
_BARE_DOLLAR = re.compile(r"(?<!\\)\$")
MAX_CHARACTERS = 2000
"""Longer texts are no answers, and are compared as they stand."""


def plain(text: str) -> str:
    """`text` in one spelling: LaTeX in ASCII, numbers without separators, units as words, nothing that is dress alone.

    Two letters of text alone stand in braces each, so that they are read as a word and not as a product. The result
    keeps every number, word and sign of the text that could distinguish two answers.
    """
    text = as_latex(text)
    for _ in range(3):  # a prefix may stand inside emphasis, emphasis inside a prefix
        before = text
        text = applied(_EMPHASIS, text.strip())
        text = _PREFIX.sub("", text, count=1)
        text = _without_stop(text.strip())
        if text == before:
            break
    text = _without_dollars(_DELIMITERS.sub(" ", text))
    text = _TWO_LETTERS_OF_TEXT.sub(r"{\1}{\2}", text) if _TWO_LETTERS_OF_TEXT.fullmatch(text) else text
    text = applied(_COMMANDS, text)
    while True:
        unwrapped = _TEXTS.sub(_unwrapped, text)
        if unwrapped == text:
            break
        text = unwrapped
    text = numbers(_PREFIX.sub("", _MODULUS.sub(r" mod \1 ", text), count=1))
    text = _without_stop(" ".join(_UNIT_FRACTION.sub(_unit_quotient, text).split()))
    return _lowered(text) if _FORMULA.fullmatch(text) else text


def _unit_quotient(match: re.Match[str]) -> str:
    """`\frac{km}{h}` as `km/h`; of single letters, as in `\frac{m}{s}`, it may be algebra."""
    upper, lower = match[1], match[2]
    are_units = unit_of(upper) is not None and unit_of(lower) is not None and len(upper + lower) > 2
    return f" {upper}/{lower}" if are_units else match.group()


def _unwrapped(match: re.Match[str]) -> str:
    inner = match[1]
    if inner.strip() in _FUNCTION_NAMES:
        return rf"\operatorname {{{inner.strip()}}}" if inner.strip() in ("lcm", "gcd") else rf"\{inner.strip()} "
    before = match.string[: match.start()].rstrip()
    return inner if before.endswith(("_", "^", "_{", "^{")) else f" {inner} "


def _without_dollars(text: str) -> str:
    r"""Dollars that delimit go; one alone before a number is money, `\$`."""
    if len(_BARE_DOLLAR.findall(text)) == 1:
        text = re.sub(r"(?<!\\)\$\s*(?=[\d.])", r"\\$", text)
    return _BARE_DOLLAR.sub(" ", text)


def _without_stop(text: str) -> str:
    text = _TRAILING_SPACE.sub("", text)
    while text.endswith((".", "!", ",", ";", ":")) and not text.endswith("...") and len(text) > 1:
        if text.endswith("!") or re.search(r"(?:^|[\s.])[A-Za-z]\.[A-Za-z]\.$", text):
            break
        text = _TRAILING_SPACE.sub("", text[:-1])
    return text
