"""One JSON object a line, safe for every reader of lines."""

import json
from typing import Any

_LINE_BREAKS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def json_line(record: dict[str, Any]) -> str:
    """The record as one line. Unicode stays readable, but line breaks beyond ASCII, at which `str.splitlines` cuts, are
    escaped."""
    return json.dumps(record, ensure_ascii=False).translate(_LINE_BREAKS) + "\n"
