"""Multiple choice: the options of a record, as the model sees them, and the letter of the right one."""

import re
from collections.abc import Collection
from decimal import Decimal, InvalidOperation
from string import ascii_uppercase
from typing import Any

from megatron_offgrpo.data import fields
from megatron_offgrpo.data.rejects import RecordError

OPTION_FIELDS = ("options", "choices")
_LETTER = re.compile(r"\(?([A-Za-z])[).:]?")
# Before the text of an option: "A. 12 cm", "(A) 12 cm", "A) 12 cm", "A: 12 cm".
_LETTERED = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])[.):])\s*(?=\S)")


def with_options(problem: str, options: tuple[str, ...]) -> str:
    """The question, its options with letters, and how to answer."""
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    return f"{problem}\n\n" + "\n".join(lines) + "\n\nAnswer with the letter of the right option in \\boxed{}."


def options_and_letter(
    record: dict[str, Any], field: str, columns: dict[str, str], answer_field: str
) -> tuple[tuple[str, ...], str]:
    """The options of a record and the letter of the right one.

    Args:
        field: the field of all options; blank without one.
        columns: those of one option each, with their letters; see `option_columns`.

    Raises:
        RecordError: the options cannot be read, or the answer is none of them, or several.
    """
    given = {field: record[field]} if field else {}
    if columns:
        given[next(iter(columns))] = {letter: record[name] for name, letter in columns.items()}
    options, *others = [read_options(value, where) for where, value in given.items()]
    if others and others[0] != options:
        raise RecordError("two lists of options", next(iter(columns)), expected=f"those of {field}", got=others[0])
    answer = fields.answer(record, answer_field, "", required=True)
    # "option_b", or "2" of "option2".
    named = {letter for name, letter in columns.items() if answer.strip() in (name, re.sub(r"^\D+", "", name))}
    if not any(name[-1].isdigit() for name in columns):
        in_list = bool(field) and isinstance(fields.from_json_text(record[field], field, "a list"), list)
        named |= _letters_of_number(record[answer_field], options, in_list)
    return options, right_letter(answer, options, answer_field, named)


def _letters_of_number(answer: Any, options: tuple[str, ...], in_list: bool) -> set[str]:
    """The letters of all that a number of JSON or Parquet may mean: a place, counted from 0, and a value.

    Only options in a list have places of their own; beside others, a place only makes a value uncertain.
    """
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, bool) or not isinstance(answer, int | float):
        return set()
    letters = {letter for letter, option in zip(ascii_uppercase, options, strict=False) if _number(option) == answer}
    if (in_list or letters) and answer in range(len(options)):
        letters.add(ascii_uppercase[int(answer)])
    return letters


def _number(option: str) -> Decimal | None:
    try:
        number = Decimal(option.replace("\\(", "").replace("\\)", "").strip(" $"))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def read_options(value: Any, where: str) -> tuple[str, ...]:
    """The texts of the options: a list, an object by letter, or ARC's `text` and `label`; or the JSON text of one.

    Letters that the texts themselves begin with are left out.

    Raises:
        RecordError: none of these, fewer than two options or more than letters, or other labels than A, B, C, ...
    """
    value = fields.from_json_text(value, where, "a list of options")
    labels: Any = None
    if isinstance(value, dict) and set(value) == {"text", "label"}:
        value, labels = value["text"], value["label"]
    elif isinstance(value, dict):
        # A Parquet file has a column for each letter that any of its records has.
        by_label = sorted((str(label), text) for label, text in value.items() if text is not None)
        value, labels = [text for _, text in by_label], [label for label, _ in by_label]
    if not isinstance(value, list) or not 2 <= len(value) <= len(ascii_uppercase):
        raise RecordError("no options", where, expected="2 to 26 texts, or an object of them by letter", got=value)
    letters = list(ascii_uppercase[: len(value)])
    if labels is not None and [str(one).strip().upper() for one in labels] != letters:
        raise RecordError("unknown labels of options", where, expected=", ".join(letters), got=labels)
    texts = [
        fields.answer({"option": one}, "option", f"{where}[{index}].", required=True) for index, one in enumerate(value)
    ]
    if [_own_letter(text) for text in texts] == letters:
        texts = [_LETTERED.sub("", text, count=1) for text in texts]
    return tuple(text.strip() for text in texts)


def right_letter(answer: str, options: tuple[str, ...], where: str, named: Collection[str] = ()) -> str:
    """The letter of the right option, which the answer names by its letter, its text, or both.

    Args:
        named: letters that the answer names otherwise, by a place or a column.

    Raises:
        RecordError: none of the options, or several: a text that stands twice, or is another one's letter or place.
    """
    letters, answer = ascii_uppercase[: len(options)], answer.strip()
    found = {letter for letter, option in zip(letters, options, strict=True) if option == answer} | {*named}
    alone = _LETTER.fullmatch(answer)
    if alone and alone.group(1).upper() in letters:
        found.add(alone.group(1).upper())
    own = _own_letter(answer)
    if own in letters and options[letters.index(own)] == _LETTERED.sub("", answer, count=1):
        found.add(own)
    if len(found) != 1:
        reason = "the answer is several of the options" if found else "the answer is none of the options"
        expected = f"one of the letters {', '.join(letters)}, or the text of one option"
        raise RecordError(reason, where, expected=expected, got=answer)
    return found.pop()


def _own_letter(text: str) -> str:
    match = _LETTERED.match(text)
    return "none" if match is None else match.group(1) or match.group(2)
