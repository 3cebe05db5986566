"""Texts that are a whole list of texts or messages, as JSON, Python or numpy write it: of a table, or of `str()`."""

import ast
import json
import re
from typing import Any

_BEGINS = re.compile(r"""\s*(?:(?:np\.|numpy\.)?array\s*\(\s*|\[\s*)*(?:\{\s*)?['"]""")
_MESSAGES_BEGIN = re.compile(r"""\s*(?:(?:np\.|numpy\.)?array\s*\(\s*|\[\s*)*\{\s*['"]""")
_KEY_OF_A_MESSAGE = re.compile(r"""['"](?:role|content|from|value)['"]\s*:""")
_KEYS = ({"role"}, {"content"}, {"from"}, {"value"}, {"type", "text"})
# What numpy writes beside Python's lists: a call, a type, objects without commas between them.
_ARRAY, _DTYPE = re.compile(r"(?:\b(?:np|numpy)\.)?\barray\s*\("), re.compile(r",\s*dtype=[^()]+(?=\))")


def is_written(text: str) -> bool:
    """Whether a text is, as a whole, a list of texts or messages, or one message.

    Messages that are cut off count too. An answer that only begins so, such as `["a"] is the list`, or a list of
    numbers, `[1, 2]`, does not.
    """
    if not _BEGINS.match(text):
        return False
    # Escapes and line breaks say nothing of the structure, and may be wrong: LaTeX in JSON.
    bare = re.sub(r"\\.|\s", " ", text, flags=re.DOTALL).strip()
    try:
        value, end = json.JSONDecoder().raw_decode(bare)
    except (ValueError, RecursionError):
        pass
    else:
        return end == len(bare) and _holds_texts(value)
    plain = re.sub(r"\}\s*\{", "},{", _DTYPE.sub("", _ARRAY.sub("(", bare)))
    try:
        return _holds_texts(ast.literal_eval(plain))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return bool(_MESSAGES_BEGIN.match(text) and _KEY_OF_A_MESSAGE.search(text))


def _holds_texts(value: Any) -> bool:
    if isinstance(value, dict):
        return any(keys <= value.keys() for keys in _KEYS)
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) or _holds_texts(one) for one in value)
