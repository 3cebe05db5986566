"""Columns that hold one option of a multiple-choice question each: A, B, ...; option_a, optionB, choice_1, ..."""

import re
from string import ascii_uppercase
from typing import Any

_COLUMN = re.compile(r"(?P<family>|(?i:opt|op|option|choice|answer)(?i:s?)[ _.-]?)(?P<label>[A-Za-z]|\d{1,2})")
# Words that end in a letter, which is no label.
_WORDS = ("options", "choices", "answers", "opts", "ops", "opt")


def option_columns(record: dict[str, Any]) -> list[dict[str, str]]:
    """Column -> letter of its option, in the order of the letters, for each family of names that a record has.

    A family is names that differ in their label alone, has a first and a second label, and a text or number in each
    column. Numbers count from 1, or from 0 where there is such a column. `a` alone is no option, nor is `answer1`.
    """
    families: dict[str, dict[str, str]] = {}
    for name, value in record.items():
        match = _COLUMN.fullmatch(name) if isinstance(name, str) and name.lower() not in _WORDS else None
        if match is None or value is None or value == "":
            continue
        family, label = match["family"].lower().strip(" _.-"), match["label"]
        if label.isdigit() and family not in ("", "answer", "answers"):
            families.setdefault(f"{family} by number", {})[str(int(label))] = name
        elif not label.isdigit() and (family or label.isupper()):
            families.setdefault(family, {})[label.upper()] = name
    return [columns for family, names in families.items() if (columns := _by_letter(names, family.endswith("number")))]


def _by_letter(names: dict[str, str], by_number: bool) -> dict[str, str]:
    """Column -> letter, of label -> column; empty without the first two labels."""
    labels = list(ascii_uppercase)
    if by_number:
        first = 0 if "0" in names else 1
        labels = [str(number) for number in range(first, first + len(ascii_uppercase))]
    if not {*labels[:2]} <= names.keys():
        return {}
    return {names[one]: letter for one, letter in zip(labels, ascii_uppercase, strict=True) if one in names}
