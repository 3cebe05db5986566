"""Reference answers that no solution can match, and why."""

import re

from megatron_offgrpo.data.answers import reference_answer

_PLACEHOLDERS = re.compile(
    "proof|prove|proved|proven|notfound|not found|n/a|n\\.a|none|null|nil|unknown|tbd|todo|missing|no answer"
    "|not available|not applicable|not given|not provided|omitted|error|#ref!|#n/a|#value!|see above|see below"
    "|no (?:answer|solution|proof) (?:is |was )?(?:provided|given|available|found|needed|required)"
    "|(?:the )?(?:answer|solution|proof) (?:is |was )?(?:omitted|missing|unavailable)"
    "|(?:the )?(?:answer|solution|proof) (?:is |was )?(?:not (?:provided|given|available|found))"
    "|略|答案略|证明略|无|无答案|证明|见解析|证明见解析|未知|暂无(?:答案|解答|解析)?|没有答案|(?:答案|解答|解析)?(?:缺失|待补充)"
)
_MISSING = re.compile("na|NA|nan|NaN|NAN")
"""Na is sodium, and Nan a name."""
_ANNOUNCEMENT = re.compile(
    r"(?:the )?(?:final |correct )?(?:answer|solution|result)s?(?: is| are)?\s*[:：]?"
    r"|(?:最终|正确)?(?:答案|解答|结果|解)(?:为|是)?\s*[:：]?"
)
"""What announces an answer that is not there."""
_PROSE = re.compile(
    r"\b(?:see|refer to)\b.*\b(?:proof|above|below|solution|figure|text|answer|explanation|page|section)\b"
    r"|^see\s|^proof\b|^prove\b|\bproof is\b|\bleft (?:to|as)\b.*\b(?:reader|exercise)\b"
    r"|\banswers?\s+(?:may|will|can)?\s*var(?:y|ies)\b|^omitted\b"
    r"|^(?:show|prove|verify|demonstrate) that\b|\b(?:is|are|has been|have been) (?:proved|proven)\b"
    r"|\bas (?:shown|proved|required)\b|\bq\.?e\.?d\b|^(?:证明|见|解析)[:：]?|证毕",
    re.IGNORECASE,
)  # fmt: skip
_LINK = re.compile(r"https?://|ftp://|\bwww\.\w", re.IGNORECASE)
_MARKUP = re.compile(
    r"</?(?:p|div|span|br|hr|img|a|b|i|u|em|strong|sub|sup|table|t[drh]|ul|ol|li|h[1-6]|html|body|font|center|code|pre)(?:\s[^<>]*)?/?>"
    r"|!\[[^\]]*\]\(|\[/?asy\]|\\(?:includegraphics|begin\s*{(?:asy|tikzpicture)})",
    re.IGNORECASE,
)
_BRACES = re.compile(r"\\\\|\\[{}]|[{}]")
_PAIRS = ((r"\\left(?![A-Za-z])", r"\\right(?![A-Za-z])"), (r"\\begin\s*{", r"\\end\s*{"))
# What can be compared: a letter or digit that is no LaTeX command's, or a sign that means something alone.
_COMMAND = re.compile(r"\\[A-Za-z]+")
_SYMBOLS = re.compile(
    r"\\(?:emptyset|varnothing|infty|mathbb|l[te]q?|g[te]q?|ne|neq|perp|parallel|in|notin|subset(?:eq)?|supset(?:eq)?"
    r"|cup|cap|to|sim|cong|equiv|approx|times|div|pm|oplus|nabla|partial|ell|hbar"
    r"|(?:var)?(?:alpha|beta|[Gg]amma|[Dd]elta|epsilon|zeta|eta|[Tt]heta|iota|kappa|[Ll]ambda|mu|nu|[Xx]i|[Pp]i|rho"
    r"|[Ss]igma|tau|[Uu]psilon|[Pp]hi|chi|[Pp]si|[Oo]mega))(?![A-Za-z])"
    r"|[∅∞π⊥∥<>=≤≥≠≈≡∈∉⊂⊆]|\\{\s*\\}"
)
MAX_WORDS = 25
"""Longer texts of words are explanations: no solution repeats them word for word."""
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def reference_fault(reference: str) -> str | None:
    """Why no solution could match a record's reference answer, its box or mark taken off; None where one could."""
    return fault(reference_answer(reference))


def fault(reference: str) -> str | None:
    """Why no solution could match `reference`: a kind such as `placeholder`; None where one could.

    `reference` is the final answer of the record: what stood around it (a box, a mark) is taken off.
    """
    plain = re.sub(
        r"\\(?:text|mathrm|textbf|mathbf|boxed)\s*\{([^{}]*)\}|[$*`\"]", lambda match: match[1] or "", reference
    )
    plain = " ".join(plain.split()).strip()
    low = plain.casefold().rstrip(".。:：").strip()
    named = re.sub(r"\s*/\s*", "/", low.replace("_", " "))
    if not plain or _ANNOUNCEMENT.fullmatch(low):
        return "empty"
    if _MISSING.fullmatch(plain) or _PLACEHOLDERS.fullmatch(named) or _PLACEHOLDERS.fullmatch(named.strip("() []<>")):
        return "placeholder"
    if _LINK.search(reference):
        return "link"
    if _MARKUP.search(reference):
        return "markup"
    if not _braces_balance(reference):
        return "unclosed brace"
    if any(len(re.findall(one, reference)) != len(re.findall(other, reference)) for one, other in _PAIRS):
        return "unclosed bracket"
    if not _SYMBOLS.search(plain) and not any(letter.isalnum() for letter in _COMMAND.sub(" ", plain)):
        return "no content"
    if _PROSE.search(low) or len(_WORD.findall(plain)) > MAX_WORDS:
        return "prose"
    return None


def _braces_balance(text: str) -> bool:
    depth = 0
    for match in _BRACES.finditer(text):
        if match.group() in "{}":
            depth += 1 if match.group() == "{" else -1
            if depth < 0:
                return False
    return depth == 0
