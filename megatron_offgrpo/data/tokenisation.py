"""Groups of texts to groups of token ids, by the student's tokenizer and chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_offgrpo.data.chat import ChatFormat, encode
from megatron_offgrpo.data.fields import CUT
from megatron_offgrpo.data.labelling import LabelledGroup
from megatron_offgrpo.data.rejects import RecordError
from megatron_offgrpo.data.store_schema import StoreRow
from megatron_offgrpo.data.thinking import ThinkTags
from megatron_offgrpo.errors import DataError


def load_tokenizer(folder: Path) -> Any:
    """The Hugging Face tokenizer in `folder`.

    Raises:
        DataError: no tokenizer there, or one without a chat template or an EOS token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as cause:  # transformers raises OSError, ValueError, KeyError, ... on damaged folders
        message = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise DataError(f"cannot load the tokenizer ({message})", where=str(folder)) from None
    if not tokenizer.chat_template:
        raise DataError(
            "this tokenizer has no chat template",
            where=str(folder),
            expected="chat_template.jinja or `chat_template` in tokenizer_config.json",
            remedy="copy the chat template of the model's instruct version into the folder",
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            "this tokenizer has no EOS token", where=str(folder), remedy="set `eos_token` in tokenizer_config.json"
        )
    return tokenizer


@dataclass(frozen=True)
class Limits:
    """The longest prompt and response, in tokens."""

    prompt_tokens: int
    response_tokens: int


def tokenise(
    groups: Sequence[LabelledGroup], chat: ChatFormat, limits: Limits, thinking: ThinkTags
) -> list[StoreRow | RecordError]:
    """Token ids of each group: the prompt by the chat template up to the response, the response as it continues it.

    A response gets the end of turn, one whose text ends in it no second one; see `response_tokens`. Longer responses
    than the limit are cut, lose their end and are marked as truncated. Log-probs may stand for the tokens of the text
    or for what is stored; an end without one gets mu = 0, as everywhere where no behaviour log-prob is known. Those of
    a response that is cut here may end with the cut.

    Returns:
        for each group its row, or why it cannot be stored: a prompt over the limit, a template that refuses it, or
        log-probs of another length than the response.
    """
    prompts = [_render(group, chat) for group in groups]
    responses = iter(response_tokens(groups, prompts, chat, thinking))
    prompt_ids = iter(encode(chat.tokenizer, [prompt for prompt in prompts if isinstance(prompt, str)]))
    rows: list[StoreRow | RecordError] = []
    for group, prompt in zip(groups, prompts, strict=True):
        own = [next(responses) for _ in group.group.trajectories]
        if isinstance(prompt, RecordError):
            rows.append(prompt)
            continue
        try:
            rows.append(_row(group, next(prompt_ids), own, limits))
        except RecordError as error:
            rows.append(error)
    return rows


def token_counts(groups: Sequence[LabelledGroup], chat: ChatFormat, thinking: ThinkTags) -> list[list[int]]:
    """Tokens of each response of each group, with its end."""
    prompts = [_render(group, chat) for group in groups]
    lengths = (len(one.whole) for one in response_tokens(groups, prompts, chat, thinking))
    return [[next(lengths) for _ in group.group.trajectories] for group in groups]


@dataclass(frozen=True)
class ResponseTokens:
    """One response in tokens."""

    plain: list[int]
    """Tokens of the text as it is."""
    whole: list[int]
    """What is trained on: up to the end of turn, which stands once."""
    same: int
    """So many tokens at the start of both are the same."""


def response_tokens(
    groups: Sequence[LabelledGroup], prompts: Sequence[str | RecordError], chat: ChatFormat, thinking: ThinkTags
) -> list[ResponseTokens]:
    """Tokens of all responses of all groups, in order.

    Where the template opens the thought, a response that begins with the same tag loses it; where the template writes
    white space before a response, one that begins without it gets it. A response with log-probs stays as it is, since
    these belong to its tokens. One that its generator cut gets no end.
    """
    contexts, texts, cut = [], [], []
    for group, prompt in zip(groups, prompts, strict=True):
        for one in group.group.trajectories:
            before = prompt if isinstance(prompt, str) else ""  # refused: only its length in tokens is asked for
            text = one.text if one.logprobs is not None else _continued(before, one.text, chat, thinking)
            contexts.append(before)
            texts.append(text)
            cut.append(one.finish_reason == CUT)
    found = zip(chat.response_ids(contexts, texts), cut, strict=True)
    return [_ended(ids, chat, was_cut) for ids, was_cut in found]


def _continued(prompt: str, text: str, chat: ChatFormat, thinking: ThinkTags) -> str:
    text = thinking.continued(prompt, text)
    return text if not text or text.startswith(chat.gap) else chat.gap + text


def _ended(ids: list[int], chat: ChatFormat, was_cut: bool) -> ResponseTokens:
    if was_cut:
        return ResponseTokens(ids, ids, len(ids))
    body, given_end = chat.without_end(ids)
    return ResponseTokens(ids, [*body, chat.end], len(body) + (given_end == chat.end))


def _render(group: LabelledGroup, chat: ChatFormat) -> str | RecordError:
    try:
        return chat.prompt(group.group.problem, group.group.system)
    except Exception as cause:  # templates raise jinja2 errors of many kinds, `raise_exception` among them
        return RecordError(
            "chat template refuses", "problem", expected="a prompt", got=f"{type(cause).__name__}: {cause}"
        )


def _row(group: LabelledGroup, prompt_ids: list[int], tokens: list[ResponseTokens], limits: Limits) -> StoreRow:
    if len(prompt_ids) > limits.prompt_tokens:
        raise RecordError(
            "prompt too long",
            "problem",
            expected=f"at most {limits.prompt_tokens} tokens",
            got=f"{len(prompt_ids)} tokens",
        )
    trajectories = group.group.trajectories
    responses, logprobs, truncated = [], [], []
    for index, (one, found) in enumerate(zip(trajectories, tokens, strict=True)):
        mu = _behaviour(one.logprobs, found, limits.response_tokens, f"trajectories[{index}].logprobs")
        truncated.append(one.finish_reason == CUT or len(found.whole) > limits.response_tokens)
        responses.append(found.whole[: limits.response_tokens])
        logprobs.append(None if mu is None else mu[: limits.response_tokens])
    return StoreRow(
        group_id=group.group.group_id,
        problem=group.group.problem,
        answer=group.group.answer,
        prompt_ids=prompt_ids,
        response_ids=responses,
        rewards=list(group.rewards),
        given_rewards=[one.reward for one in trajectories],
        label_statuses=list(group.statuses),
        sources=[one.source for one in trajectories],
        on_policy=[one.on_policy for one in trajectories],
        truncated=truncated,
        behaviour_logprobs=logprobs,
        sample_ids=[one.sample_id for one in trajectories],
        texts=[one.text for one in trajectories],
        label_sources=[group.label] * len(trajectories),
        verified_rewards=None if group.verified is None else list(group.verified),
        majority_rewards=None if group.majority is None else list(group.majority),
        extracted=None if group.extracted is None else list(group.extracted),
        system=group.group.system,
        origin=group.group.origin,
        finish_reasons=[one.finish_reason for one in trajectories],
    )


def _behaviour(given: tuple[float, ...] | None, found: ResponseTokens, limit: int, where: str) -> list[float] | None:
    if given is None:
        return None
    # A store's own export has the log-probs of the tokens that were kept.
    if len(given) == limit < len(found.whole):
        return list(given)
    if len(given) not in (len(found.plain), len(found.whole)):
        raise RecordError(
            "log-probs of another length",
            where,
            expected=f"{len(found.plain)} (tokens of the text) or {len(found.whole)} (with its end)",
            got=f"{len(given)}",
        )
    # What stands in the place of the text's own end, or is added to it, is no token that was sampled.
    sampled = len(given) if len(found.plain) < len(found.whole) else found.same
    kept = given[:sampled]
    return [*kept, *[0.0] * (len(found.whole) - len(kept))]
