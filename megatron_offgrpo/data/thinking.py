"""Where the thought of a reasoning model ends: one list of tags for labels, grades and prompts."""

import re
from collections.abc import Iterable

from megatron_offgrpo.data_config import THINK_TAGS
from megatron_offgrpo.errors import ConfigError

_BETWEEN = "..."


class ThinkTags:
    """Finds thoughts by their tags.

    Args:
        tags: pairs OPEN...CLOSE. Any closing tag ends a thought, whichever tag opened it.

    Raises:
        ConfigError: something that is no such pair.
    """

    def __init__(self, tags: Iterable[str] = THINK_TAGS) -> None:
        pairs = [_parted(tag) for tag in tags]
        if not pairs:
            raise ConfigError("no tags", where="think tags", expected="OPEN...CLOSE, for example <think>...</think>")
        opening, closing = ("|".join(map(re.escape, side)) for side in zip(*pairs, strict=True))
        self._opening = re.compile(opening, re.IGNORECASE)
        self._closing = re.compile(closing, re.IGNORECASE)
        self._opening_at_end = re.compile(rf"(?:{opening})\s*\Z", re.IGNORECASE)

    def final_part(self, text: str) -> str:
        """What follows the last closing tag; the whole text where there is none."""
        return text[_last_end(self._closing, text) :]

    def is_unclosed(self, text: str, opened: bool = False) -> bool:
        """Whether a text ends inside a thought.

        Args:
            opened: its prompt ended inside one.
        """
        closed, begun = _last_end(self._closing, text), _last_end(self._opening, text)
        return begun > closed or (opened and not closed)

    def opens(self, prompt: str) -> bool:
        """Whether a prompt ends inside a thought: the response then thinks without opening it itself."""
        return self._opening_at_end.search(prompt) is not None

    def continued(self, prompt: str, text: str) -> str:
        """The response to a prompt that opens the thought: an opening tag of its own would be the second one."""
        at_end = self._opening_at_end.search(prompt)
        at_start = self._opening.match(text.lstrip())
        if at_end is None or at_start is None:
            return text
        opened = at_end.group()
        if at_start.group().lower() != opened.rstrip().lower():
            return text  # another tag than the template's
        after, space = text.lstrip()[at_start.end() :], opened[len(opened.rstrip()) :]
        return after[len(space) :] if after.startswith(space) else after.lstrip()


def _last_end(pattern: re.Pattern[str], text: str) -> int:
    last = 0
    for match in pattern.finditer(text):
        last = match.end()
    return last


def _parted(tag: str) -> tuple[str, str]:
    opening, between, closing = (part.strip() for part in tag.partition(_BETWEEN))
    if not (opening and between and closing):
        expected = "OPEN...CLOSE, for example <think>...</think>"
        raise ConfigError("no pair of tags", where="think tags", expected=expected, got=tag)
    return opening, closing
