"""Unicode's mathematics as LaTeX: digits of all scripts, powers, indices, fractions, roots, letters and signs."""

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₒₓₙₘₖₚₛₜᵢⱼ", "0123456789+-=()aeoxnmkpstij")
_RAISED = re.compile("([⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ]+)")
_LOWERED = re.compile("([₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₒₓₙₘₖₚₛₜᵢⱼ]+)")
_FRACTION = re.compile(r"(\d+)\u2044(\d+)")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufe0e\ufe0f]")
_VULGAR_FRACTION = re.compile("([\u00bc-\u00be\u2150-\u215e\u2189])")
_OVERLINED = re.compile(r"(?:\d[\u0305\u0307])+")
"""Digits with a combining line or dot above each."""
_THIN_SPACES = re.compile("[\u00a0\u2000-\u200a\u202f\u205f\u3000]")
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
_ROOT = re.compile(r"([√∛∜])\s*(?:\(((?:[^()]|\([^()]*\))*)\)|(\d+(?:\.\d+)?|[A-Za-z]|\\pi|(?=\{)))?")

_SIGNS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\u2015\ufe63\uff0d", "-"),
    **dict.fromkeys("×✕✖⨯", r" \times "), **dict.fromkeys("·⋅∙•", r" \cdot "), "÷": r" \div ", "∗": "*", "∕": "/",
    "∶": ":",
    "±": r" \pm ", "∓": r" \mp ", "≤": r" \le ", "≦": r" \le ", "⩽": r" \le ", "≥": r" \ge ", "≧": r" \ge ",
    "⩾": r" \ge ",
    "≠": r" \ne ", "≈": r" \approx ", "≡": r" \equiv ", "∞": r" \infty ", "∅": r" \emptyset ", "⌀": r" \emptyset ",
    "∈": r" \in ", "∉": r" \notin ",
    "∪": r" \cup ", "∩": r" \cap ", "∖": r" \setminus ", "⊂": r" \subset ", "⊆": r" \subseteq ", "→": r" \to ",
    "⇒": r" \Rightarrow ", "⟹": r" \Rightarrow ", "↔": r" \leftrightarrow ", "⇔": r" \Leftrightarrow ",
    "∧": r" \land ", "∨": r" \lor ", "¬": r" \neg ", "∀": r" \forall ", "∃": r" \exists ", "∠": r" \angle ",
    "△": r" \triangle ", "⊥": r" \perp ", "∥": r" \parallel ",
    "∑": r" \sum ", "∏": r" \prod ", "∫": r" \int ", "∂": r" \partial ", "∇": r" \nabla ", "…": r" \ldots ",
    "⋯": r" \ldots ",
    "⌊": r" \lfloor ", "⌋": r" \rfloor ", "⌈": r" \lceil ", "⌉": r" \rceil ", "⟨": r" \langle ", "⟩": r" \rangle ",
    "∣": "|",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "ℓ": r"\ell ",
    "°": r" \degree ", "℃": r" \degree C", "℉": r" \degree F", "′": "'", "″": "''", "’": "'", "‘": "'", "“": '"',
    "”": '"', "，": ", ", "、": ", ", "；": "; ",
    "٫": ".", "٬": ",", "。": ". ", "【": "[", "】": "]", "「": '"', "」": '"', "٪": "%",
}  # fmt: skip
_SMALL_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma sigma tau"
    " upsilon phi chi psi omega"
)
_CAPITAL_GREEK = "- - Gamma Delta - - - Theta - - Lambda - - Xi - Pi - - Sigma - Upsilon Phi - Psi Omega"
_GREEK = {
    chr(code): f"\\{name} "
    for first, names in ((0x3B1, _SMALL_GREEK), (0x391, _CAPITAL_GREEK))
    for code, name in enumerate(names.split(), first)
    if name != "-"
}
_GREEK |= {"ϕ": r"\phi ", "ϵ": r"\epsilon ", "ϑ": r"\theta "}
_TO_LATEX = str.maketrans(_SIGNS | _GREEK)
_KEPT_FROM_NFKC = re.compile("([℃℉ℝℤℕℚℂℓ…]|[^℃℉ℝℤℕℚℂℓ…]+)")


def as_latex(text: str) -> str:
    """`text` with its mathematics in ASCII: `x²` as `x^{2}`, `½` as `\\frac{1}{2}`, `４２` as `42`."""
    if text.isascii():
        return text
    text = _INVISIBLE.sub("", text)
    text = _THIN_SPACES.sub("\\\\,", text)
    text = _VULGAR_FRACTION.sub(r" \1", text)
    text = _RAISED.sub(lambda match: "^{" + match[1].translate(_SUPERSCRIPTS) + "}", text)
    text = _LOWERED.sub(lambda match: "_{" + match[1].translate(_SUBSCRIPTS) + "}", text)
    text = _OVERLINED.sub(lambda match: r"\overline{" + re.sub(r"\D", "", match.group()) + "}", text)
    text = text.translate(_TO_LATEX)
    text = "".join(
        part if part in "℃℉ℝℤℕℚℂℓ…" else unicodedata.normalize("NFKC", part) for part in _KEPT_FROM_NFKC.findall(text)
    )
    text = "".join(_ascii_digit(letter) for letter in text).translate(_TO_LATEX)
    text = _FRACTION.sub(r"\\frac{\1}{\2}", text)
    return _ROOT.sub(_as_root, text)


def _ascii_digit(letter: str) -> str:
    if letter.isascii():
        return letter
    value = unicodedata.decimal(letter, None)
    return letter if value is None else str(value)


def _as_root(match: re.Match[str]) -> str:
    inner = match[2] if match[2] is not None else match[3]
    return _ROOTS[match[1]] + (f"{{{inner}}}" if inner else " ")
