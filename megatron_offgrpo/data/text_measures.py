"""Measures of a text, each a pure function: what filters, duplicates and decontamination compare."""

import re
import unicodedata
import zlib
from hashlib import blake2b

LOOP_CHARACTERS = 4000
"""Loops stand at the end of a response; its last characters are looked at."""
SHINGLE_WORDS = 3

_WORD = re.compile(r"[^\W_]+")
_LETTER = re.compile(r"[^\W\d_]")
# Letters at or beyond U+0400 but for extended Latin and Greek, letterlike symbols and mathematical alphabets.
_FOREIGN = re.compile(
    "[\u0400-\u1dff\u2c00-\ua71f\ua7ff-\uab2f\uab6c-\ufaff\ufb07-\uffee\U00010000-\U0001d3ff\U0001d800-\U0003ffff]"
)
_LAYOUT = re.compile(r"\\left|\\right|\\[,;!]|\s+|\$|\\[()\[\]]")


def normalised(text: str) -> str:
    """The text without white space, math delimiters, case, and a last full stop or colon; operators and digits stay.

    Two problems with one normalised text are the same problem; `x + 1` and `x - 1` are not.
    """
    return _LAYOUT.sub("", unicodedata.normalize("NFKC", text)).casefold().rstrip(".:。")


def words(text: str) -> list[str]:
    """Runs of letters and digits, without case."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def shingles(text: str) -> set[str]:
    """All runs of three words; a shorter text is one shingle."""
    found = words(text)
    return {" ".join(found[at : at + SHINGLE_WORDS]) for at in range(max(1, len(found) - SHINGLE_WORDS + 1))}


def jaccard(one: set[str], other: set[str]) -> float:
    """|A and B| / |A or B|; two empty sets are equal."""
    union = len(one | other)
    return len(one & other) / union if union else 1.0


def foreign_share(text: str) -> float:
    """Share of the letters that are neither Latin nor Greek nor mathematical symbols; 0 without letters."""
    if text.isascii():
        return 0.0
    letters = _LETTER.findall(text)
    return sum(1 for letter in letters if _FOREIGN.match(letter)) / len(letters) if letters else 0.0


def compression_ratio(text: str) -> float:
    """Bytes of the last 4000 characters over bytes that zlib (level 6) makes of them; loops reach 15 and more."""
    tail = text[-LOOP_CHARACTERS:].encode()
    return len(tail) / len(zlib.compress(tail, 6))


def hash_64(text: str) -> int:
    """The first 64 bits of BLAKE2b."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
