"""A tokenizer with its chat template: prompts, responses as they continue them, and the one token that ends a turn."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from typing import Any

from megatron_offgrpo.errors import ConfigError, DataError

CLOCK = "strftime_now"
"""The name by which a chat template asks Transformers for today's date."""
FIXED_DATE = "2024-07-26"
"""The date that such a template is given: what Llama 3.2's own template takes where there is no clock."""
SETTING = "chat_template_kwargs"
_PUT_BEFORE_A_TEXT = ("▁", "Ġ")
"""How SentencePiece and byte-level tokenizers write the space that some of them put before every text."""
# A response is tokenised behind these where the end of its own prompt would merge with it.
_NEUTRAL_CONTEXTS = ("\n", ":", "|")

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class ChatFormat:
    """How one model's conversations become tokens."""

    tokenizer: Any
    variables: Mapping[str, Any]
    """What the template is given beside the messages."""
    end: int
    """Token that ends a response: the template's end of turn, or the tokenizer's EOS where it closes no turn."""
    gap: str = ""
    """White space that the template writes between prompt and response (a space, in Llama 2's)."""
    space_first: bool = False
    """The tokenizer puts a space before every text, and would before a response that stands alone."""
    special: tuple[str, ...] = ()
    """Texts of its special tokens."""
    remarks: tuple[str, ...] = ()
    """What a user should know of it."""

    @property
    def end_text(self) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(self.end))

    def prompt(self, problem: str, system: str | None) -> str:
        """The template's text up to the response; it raises whatever the template raises."""
        return render(self.tokenizer, question(problem, system), self.variables)

    def response_ids(self, prompts: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each response as it continues its prompt, without special tokens of the tokenizer's own.

        Raises:
            DataError: the tokenizer merges a response with whatever stands before it.
        """
        if not self.space_first:
            return encode(self.tokenizer, texts)
        found = self._behind([self._last_section(prompt) for prompt in prompts], texts)
        for context in _NEUTRAL_CONTEXTS:
            merged = [place for place, ids in enumerate(found) if ids is None]
            again = self._behind([context] * len(merged), [texts[place] for place in merged])
            for place, ids in zip(merged, again, strict=True):
                found[place] = ids
        for ids, text in zip(found, texts, strict=True):
            if ids is None:
                raise DataError("the tokenizer merges this response with its prompt", where="tokenizer", got=text[:80])
        return [ids for ids in found if ids is not None]

    def _behind(self, contexts: Sequence[str], texts: Sequence[str]) -> list[list[int] | None]:
        """Ids of the texts behind their contexts; None where the context's own ids change."""
        heads = encode(self.tokenizer, contexts)
        whole = encode(self.tokenizer, [context + text for context, text in zip(contexts, texts, strict=True)])
        return [ids[len(head) :] if ids[: len(head)] == head else None for head, ids in zip(heads, whole, strict=True)]

    def _last_section(self, prompt: str) -> str:
        """The prompt from its last special token on; tokenizers read the sections between such tokens one by one."""
        return prompt[max([0, *(prompt.rfind(mark) for mark in self.special)]) :]

    def without_end(self, ids: list[int]) -> tuple[list[int], int | None]:
        """A response's tokens up to the end tokens it ends in, and the first of these; None where it ends in none.

        The tokenizer's EOS is such a token beside the template's end of turn. White space behind them goes with them.
        """
        ends = (self.end, self.tokenizer.eos_token_id)
        place = len(ids)
        while place and (ids[place - 1] in ends or not self.tokenizer.decode([ids[place - 1]]).strip()):
            place -= 1
        first = next((index for index in range(place, len(ids)) if ids[index] in ends), None)
        return (ids, None) if first is None else (ids[:first], ids[first])


def chat_format(tokenizer: Any, given: Mapping[str, Any] | None = None) -> ChatFormat:
    """Looks at how the template opens and closes an assistant's turn.

    Args:
        given: variables of the template, such as `enable_thinking`; one that asks for the clock gets
            `FIXED_DATE`, or the date given as `strftime_now` (2025-12-31).

    Raises:
        ConfigError: a variable that the template does not know, or that is not the user's to set.
    """
    variables, remarks = _checked(tokenizer, given or {}), []
    if CLOCK in variables:
        remarks.append(f"the chat template asks for the date: it is given {variables[CLOCK]}")
    eos, end, gap = tokenizer.eos_token_id, None, ""
    try:
        closing, gap = closing_tokens(tokenizer, variables), _gap(tokenizer, variables)
        end = next((token for token in closing if _is_special(tokenizer, token)), None)
        if end is None and (plain := tokenizer.decode(closing).strip()):
            remarks.append(
                f"the chat template closes a turn by {plain!r}, no token: responses end in the tokenizer's EOS"
            )
    except Exception as cause:  # templates raise jinja2 errors of many kinds, `raise_exception` among them
        remarks.append(
            f"the chat template refuses a short conversation ({cause}); responses end in the tokenizer's EOS"
        )
    if end not in (None, eos):
        shown, own = tokenizer.convert_ids_to_tokens([end, eos])
        remarks.append(f"responses end in {shown}, the chat template's end of turn; the tokenizer's EOS is {own}")
    special = tuple(str(token.content) for token in tokenizer.added_tokens_decoder.values())
    space_first = _puts_space_first(tokenizer)
    return ChatFormat(
        tokenizer, variables, eos if end is None else end, gap, space_first, special, remarks=tuple(remarks)
    )


def question(problem: str, system: str | None) -> Messages:
    """The messages of a problem."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": problem}]


def render(tokenizer: Any, messages: Messages, variables: Mapping[str, Any], *, to_response: bool = True) -> str:
    """The template's text of a conversation, by default up to where the response begins."""
    values = dict(variables)
    if CLOCK in values:
        now = datetime.fromisoformat(values[CLOCK])
        values[CLOCK] = lambda form: now.strftime(form)
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_response, **values)
    return text


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    if not texts:
        return []
    # verbose=False: the lengths that count are the limits of the caller, not the tokenizer's own maximum.
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def decode(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """Text of response tokens behind their prompt, special tokens included.

    SentencePiece leaves out a space at the beginning of what it decodes, and a response is not the beginning.
    """

    def plain(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    last = list(prompt_ids[-1:])
    whole, head = plain([*last, *ids]), plain(last)
    return whole[len(head) :] if whole.startswith(head) else plain(list(ids))


def closing_tokens(tokenizer: Any, variables: Mapping[str, Any]) -> list[int]:
    """The tokens that the template writes behind an answer whether or not a question follows."""
    before, answer = question("1+1?", None), {"role": "assistant", "content": "It is 2."}
    tails = []
    for messages in ([*before, answer], [*before, answer, *question("2+2?", None)]):
        text = render(tokenizer, messages, variables, to_response=False)
        tails.append(text.rpartition(answer["content"])[2] if answer["content"] in text else "")
    pairs = zip(*encode(tokenizer, tails), strict=False)
    return [last for last, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def _is_special(tokenizer: Any, token: int) -> bool:
    known = tokenizer.added_tokens_decoder
    return token in known and bool(str(known[token].content).strip())  # Gemma adds tokens of line breaks


def _gap(tokenizer: Any, variables: Mapping[str, Any]) -> str:
    """White space between prompt and response in a conversation that is written down whole."""
    before, answer = question("1+1?", None), {"role": "assistant", "content": "It is 2."}
    prompt = render(tokenizer, before, variables)
    whole = render(tokenizer, [*before, answer], variables, to_response=False)
    between = whole[len(prompt) :].partition(answer["content"])[0]
    return between if whole.startswith(prompt) and between.isspace() else ""


def _puts_space_first(tokenizer: Any) -> bool:
    (ids,) = encode(tokenizer, ["T"])
    first = tokenizer.convert_ids_to_tokens(ids[:1])
    return bool(first) and str(first[0]).startswith(_PUT_BEFORE_A_TEXT)


def _checked(tokenizer: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    try:
        template = tokenizer.get_chat_template()
    except ValueError as cause:  # several templates by name, none of them the default
        raise DataError(f"no chat template to take ({cause})", where="tokenizer") from None
    ours = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    for name in given:
        if name in ours:
            raise ConfigError("is set by the program itself", where=f"{SETTING}.{name}")
        if not re.search(rf"\b{re.escape(name)}\b", template):
            remedy = "look into the chat template for the names it uses"
            raise ConfigError("the chat template has no such variable", where=f"{SETTING}.{name}", remedy=remedy)
    variables = dict(given)
    if CLOCK in template:
        variables.setdefault(CLOCK, FIXED_DATE)
        try:
            datetime.fromisoformat(variables[CLOCK])
        except (TypeError, ValueError):
            raise ConfigError(
                "no date", where=f"{SETTING}.{CLOCK}", expected="a date such as 2025-12-31", got=variables[CLOCK]
            ) from None
    return variables
