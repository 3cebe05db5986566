"""Groups of texts to groups of token ids, by the student's tokenizer and chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_offgrpo.data.fields import CUT
from megatron_offgrpo.data.labelling import LabelledGroup
from megatron_offgrpo.data.rejects import RecordError
from megatron_offgrpo.data.store_schema import StoreRow
from megatron_offgrpo.errors import DataError

THINK = "<think>"


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


def tokenise(groups: Sequence[LabelledGroup], tokenizer: Any, limits: Limits) -> list[StoreRow | RecordError]:
    """Token ids of each group: the prompt by the chat template up to the response, the response plain plus EOS.

    Where the template ends in `<think>`, a response that begins with the same tag loses it, unless it has log-probs.
    A response whose text ends in EOS gets no second one. Longer responses than the limit are cut, lose their EOS and
    are marked as truncated. Log-probs may stand for the tokens of the text or for those and EOS; in the first case EOS
    gets mu = 0, as everywhere where no behaviour log-prob is known. Those of a response that is cut here may end with
    the cut.

    Returns:
        for each group its row, or why it cannot be stored: a prompt over the limit, a template that refuses it, or
        log-probs of another length than the response.
    """
    prompts = [_render(group, tokenizer) for group in groups]
    texts = [
        one.text if isinstance(prompt, RecordError) or one.logprobs is not None else continued(prompt, one.text)
        for group, prompt in zip(groups, prompts, strict=True)
        for one in group.group.trajectories
    ]
    rendered = [prompt for prompt in prompts if isinstance(prompt, str)]
    prompt_ids = iter(encode(tokenizer, rendered))
    text_ids = iter(encode(tokenizer, texts))
    rows: list[StoreRow | RecordError] = []
    for group, prompt in zip(groups, prompts, strict=True):
        own_ids = [next(text_ids) for _ in group.group.trajectories]
        if isinstance(prompt, RecordError):
            rows.append(prompt)
            continue
        try:
            rows.append(_row(group, next(prompt_ids), own_ids, tokenizer.eos_token_id, limits))
        except RecordError as error:
            rows.append(error)
    return rows


def continued(prompt: str, text: str) -> str:
    """The response to a prompt whose template opens the thought: its own `<think>` would be the second one."""
    opening = prompt[len(prompt.rstrip()) - len(THINK) :]
    if not opening.startswith(THINK) or not text.lstrip().startswith(THINK):
        return text
    after = text.lstrip()[len(THINK) :]
    space = opening[len(THINK) :]
    return after[len(space) :] if after.startswith(space) else after.lstrip()


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    if not texts:
        return []
    # verbose=False: the lengths that count are the limits here, not the tokenizer's own maximum.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _render(group: LabelledGroup, tokenizer: Any) -> str | RecordError:
    messages = [{"role": "user", "content": group.group.problem}]
    if group.group.system is not None:
        messages.insert(0, {"role": "system", "content": group.group.system})
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text
    except Exception as cause:  # templates raise jinja2 errors of many kinds, `raise_exception` among them
        return RecordError(
            "chat template refuses", "problem", expected="a prompt", got=f"{type(cause).__name__}: {cause}"
        )


def _row(group: LabelledGroup, prompt_ids: list[int], text_ids: list[list[int]], eos: int, limits: Limits) -> StoreRow:
    if len(prompt_ids) > limits.prompt_tokens:
        raise RecordError(
            "prompt too long",
            "problem",
            expected=f"at most {limits.prompt_tokens} tokens",
            got=f"{len(prompt_ids)} tokens",
        )
    trajectories = group.group.trajectories
    responses, logprobs, truncated = [], [], []
    for index, (one, plain) in enumerate(zip(trajectories, text_ids, strict=True)):
        was_cut = one.finish_reason == CUT
        whole = plain if was_cut or plain[-1:] == [eos] else [*plain, eos]
        where = f"trajectories[{index}].logprobs"
        mu = _behaviour(one.logprobs, len(plain), len(whole), limits.response_tokens, where)
        truncated.append(was_cut or len(whole) > limits.response_tokens)
        responses.append(whole[: limits.response_tokens])
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


def _behaviour(
    given: tuple[float, ...] | None, num_plain: int, num_whole: int, limit: int, where: str
) -> list[float] | None:
    if given is None:
        return None
    # A store's own export has the log-probs of the tokens that were kept.
    if len(given) == limit < num_whole:
        return list(given)
    if len(given) not in (num_plain, num_whole):
        raise RecordError(
            "log-probs of another length",
            where,
            expected=f"{num_plain} (tokens of the text) or {num_whole} (with EOS)",
            got=f"{len(given)}",
        )
    return [*given, *[0.0] * (num_whole - len(given))]
