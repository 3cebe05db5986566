"""Where the final answer of a solution stands."""

import re
from collections.abc import Iterator

# A box (over-escaped ones too), then what hides a brace (a line break is no escape), then the braces that count.
_BRACES = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\\\|\\[{}]|[{}]")
_BARE_BOX = re.compile(
    r"\\{1,2}boxed\s*(?=[^\s{])(-?\d+(?:[.,]\d+)*(?:/\d+)?|-?\\[dt]?frac\s*(?:\d\s*\d|{[^{}]*}\s*{[^{}]*})|\\?[A-Za-z]+)"
)
# Between two boxes that are one answer: and, or, commas, delimiters, and the name of the next value.
_BETWEEN = re.compile(
    r"(?=.*(?:,|;|&|\band\b|\bor\b|和|或|、|以及|，))"
    r"(?:[\s,;&$~、，]|\\[()\[\],;:! ]|\\q?quad|\band\b|\bor\b|\\text\s*{\s*,?\s*(?:and|or)\s*}|和|或|以及"
    r"|\\?[A-Za-z](?:_{?\w+}?)?\s*=)*",
    re.DOTALL,
)
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_MARKED = re.compile(r"####[ \t]*(\S[^\n]*)")
_HEADING = re.compile(
    r"[*_]*(?:(?:the |my )?(?:final )?(?:answer|solution|result|conclusion)|(?:最终)?(?:答案|结果|解答|结论))"
    r"[*_\s]*[:：]?[*_\s]*"
    r"|[*_]*(?:step|part|case|method|第)\s*[\dA-Z一二三四五六七八九十]+\b.*|步骤.*",
    re.IGNORECASE,
)
"""Words behind `####` that are a heading wherever text follows."""
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}|[\u3400-\u9fff]{2,}")
_ENGLISH = (
    r"\b(?:final|correct|right)?\s*(?:answers?|choice|option)\b(?:\s+(?:to|for|of)\b[^.\n:：]{0,80}?)?[*_]*\s*"
    r"(?:\b(?:is|are|was|would be|should be|must be)\b\s*[:：]?|[:：=])"
    r"|\b(?:option|choice)\s+(?=\(?[A-Z]\b)"
)
_CHINESE = r"(?:答案|结果|选项|答)[\s*】\]]*(?:就|应该?)?(?:为|是|等于|[:：]|(?<=】))\s*[:：]?"
_CHINESE_CHOICE = r"(?:故|应|因此|所以)?选(?:择|项)?\s*[:：]?\s*(?=\(?[A-Z])"
_LETTER_FIRST = r"(?=\(?[A-Z]\)?\s+is\s+the\s+(?:only\s+)?(?:correct|right)\s+(?:answer|option|choice)\b)(?<![\w(])"
_ANNOUNCED = re.compile(
    rf"(?:(?i:{_ENGLISH})|{_CHINESE}|{_CHINESE_CHOICE}|{_LETTER_FIRST})[ \t]*[*_]*\s*(?:(?i:option|choice|that)\s+)?"
)
_DENIED = re.compile(r"\b(?:not|no)(?:\s+the)?\s*$|(?:不|不是|不能|不应该?|不要|不可|非|未|勿)\s*$", re.IGNORECASE)
"""What stands before an announcement that takes it back."""
_DISPLAYED = re.compile(r"(?:\\\[(.+?)\\\]|\$\$(.+?)\$\$)", re.DOTALL)
_CLAUSE = re.compile(r"(?:\$[^$\n]*\$|\\\([^\n]*?\\\)|[^\n。！？])+?(?=\n|[。！？]|[.!?](?:[*_\"')]*)(?:\s|$)|$)")
_ASIDE = re.compile(
    r"\s*[,，;；(（]?\s*(?:\b(?:because|since|which|where|so that|as|so|hence|thus|but|rather than)\b"
    r"|因为|由于|所以|而不是|而非).*$|\s*[,，;；(（]\s*(?:and\s+)?(?:\bnot\b|不是|不选).*$",
    re.DOTALL,
)
_RULED_OUT = re.compile(r"\(?[A-Z]\)?\s+(?:is|was)\s+(?:not|wrong|incorrect|false)\b")
"""An option that is none."""
_MAX_CLAUSE = 200
_MAX_DISPLAYED = 1000
_MAX_ANNOUNCED = 20
MAX_UNBOXED_CHARACTERS = 4000
"""Without a box or a mark only the end of a solution is searched for its answer."""


def last_box(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` whose braces balance and that is not blank; None where there is none.

    Boxes joined by nothing but commas, `and` or `or` are one answer: their contents, with commas between.
    """
    return _joined(text, [(start, end, inner) for name, start, end, inner in _boxes(text) if name == "boxed"])


def final_answer(text: str) -> str | None:
    """The final answer in the part after the thinking, as it is written; None where nothing announces one.

    The first of these that there is: boxes, `\\fbox`, `<answer>`, `####`, and what follows the last "answer is",
    答案是 or the like.
    """
    boxes = _boxes(text)
    for name in ("boxed", "fbox"):
        found = _joined(text, [(start, end, inner) for kind, start, end, inner in boxes if kind == name])
        if found is not None:
            return found
    tagged = _tagged(text)
    if tagged:
        return tagged
    marked = _marked(text)
    if marked:
        return marked
    return next(announced_answers(text), None)


def reference_answer(reference: str) -> str:
    """The answer in a reference: what its box or mark holds, else all of it."""
    found = None
    if any(mark in reference for mark in ("boxed", "fbox", "####", "<answer>")):
        found = final_answer(reference)
    return reference.strip() if found is None else found


def _boxes(text: str) -> list[tuple[str, int, int, str]]:
    """(boxed or fbox, start, end, content) of the boxes that are in no other of the same name, in their order."""
    found: list[tuple[str, int, int, str]] = []
    open_braces: list[
        tuple[str, int, int] | None
    ] = []  # a box's name, start and start of content; None for other braces
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            box = open_braces.pop() if open_braces else None
            if box is not None and text[box[2] : match.start()].strip():
                found.append((box[0], box[1], match.end(), text[box[2] : match.start()]))
        elif token == "{":
            open_braces.append(None)
        elif token.endswith("{") and "box" in token:
            open_braces.append(("boxed" if "boxed" in token else "fbox", match.start(), match.end()))
    found += [("boxed", match.start(), match.end(), match[1]) for match in _BARE_BOX.finditer(text)]
    return sorted(found, key=lambda box: box[1])


def _joined(text: str, boxes: list[tuple[int, int, str]]) -> str | None:
    if not boxes:
        return None
    start, _, content = boxes[-1]
    contents = [content]
    for earlier_start, end, inner in reversed(boxes[:-1]):
        if end > start and earlier_start < start:  # the box around it
            continue
        if start - end > 60 or not _BETWEEN.fullmatch(text[end:start]):
            break
        start = earlier_start
        contents.append(inner)
    distinct = list(dict.fromkeys(one.strip() for one in reversed(contents)))
    return content if len(distinct) == 1 else ", ".join(distinct)


def _tagged(text: str) -> str | None:
    """What stands in the last pair of `<answer>` tags."""
    opened, found = None, None
    for match in _TAG.finditer(text):
        if not match[1]:
            opened = match.end()
        elif opened is not None:
            found, opened = text[opened : match.start()].strip() or found, None
    return found


def _marked(text: str) -> str | None:
    """What stands behind the last `####` that is no heading of the text after it."""
    for match in reversed(list(_MARKED.finditer(text))[-_MAX_ANNOUNCED:]):
        content, after = match[1].strip(), text[match.end() :]
        if not after.strip() or not (_HEADING.fullmatch(content) or _is_title(content, after)):
            return content
    return None


def _is_title(content: str, after: str) -> bool:
    """Whether words before a text that announces an answer: a marked answer has nothing but remarks behind it."""
    return bool(_WORD.search(content)) and next(announced_answers(after), None) is not None


def announced_answers(text: str) -> Iterator[str]:
    """What follows "answer is", "option", 答案是 and the like in the end of a text, the last one first."""
    text = text[-MAX_UNBOXED_CHARACTERS:]
    for match in reversed(list(_ANNOUNCED.finditer(text))[-_MAX_ANNOUNCED:]):
        before = text[max(0, match.start() - 12) : match.start()].lower()
        if _DENIED.search(before):
            continue
        rest = text[match.end() : match.end() + _MAX_DISPLAYED]
        displayed = _DISPLAYED.match(rest)
        if displayed:
            yield (displayed[1] or displayed[2]).strip()
            continue
        clause = _CLAUSE.match(rest[:_MAX_CLAUSE])
        if clause:
            answer = _ASIDE.sub("", clause.group()).strip(" *_\t,;:")
            if _RULED_OUT.match(answer):
                continue
            if any(letter.isalnum() for letter in answer) or answer in ("∞", "∅"):
                yield answer
