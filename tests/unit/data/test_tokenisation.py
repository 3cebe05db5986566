"""Prompts by the chat template, responses plain plus EOS, cuts and log-probs."""

import pytest

from megatron_offgrpo.data.chat import chat_format
from megatron_offgrpo.data.labelling import LabelledGroup
from megatron_offgrpo.data.rejects import RecordError
from megatron_offgrpo.data.thinking import ThinkTags
from megatron_offgrpo.data.tokenisation import Limits, load_tokenizer, tokenise
from megatron_offgrpo.errors import DataError
from megatron_offgrpo.types import GroupRecord, TrajectoryRecord
from tests.unit.data.tiny import EOS, save_tokenizer

WIDE = Limits(prompt_tokens=1000, response_tokens=1000)


def rows(groups, tokenizer, limits=WIDE):
    return tokenise(groups, chat_format(tokenizer), limits, ThinkTags())


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


def make(*trajectories, problem="Why?", system=None, group_id="g"):
    count = len(trajectories)
    group = GroupRecord(group_id, problem, "1", tuple(trajectories), system)
    return LabelledGroup(group, tuple(float(index % 2) for index in range(count)), ("ok",) * count)


def test_prompt_and_response_texts_come_back_exactly(tokenizer):
    text = "Ünïcode → \\boxed{4}\n"
    row, with_system = rows(
        [make(TrajectoryRecord(text)), make(TrajectoryRecord(text), system="Be brief.")], tokenizer, WIDE
    )
    assert tokenizer.decode(row.prompt_ids) == "<|user|>Why?<|assistant|>"
    assert tokenizer.decode(with_system.prompt_ids) == "<|system|>Be brief.<|user|>Why?<|assistant|>"
    assert row.response_ids[0][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row.response_ids[0][:-1]) == text
    assert tokenizer.eos_token_id not in row.response_ids[0][:-1]
    assert row.truncated == [False]
    assert row.texts == [text]


def test_a_response_that_ends_in_eos_gets_no_second_one(tokenizer):
    (row,) = rows([make(TrajectoryRecord("4" + EOS), TrajectoryRecord("4"), TrajectoryRecord(""))], tokenizer, WIDE)
    assert row.response_ids[0] == row.response_ids[1]
    assert row.response_ids[2] == [tokenizer.eos_token_id]


def test_a_response_that_its_generator_cut_gets_no_eos(tokenizer):
    (ids,) = tokenizer(["4 2"], add_special_tokens=False)["input_ids"]
    mu = tuple(-0.5 for _ in ids)
    cut = TrajectoryRecord("4 2", logprobs=mu, finish_reason="length")
    (row,) = rows([make(cut, TrajectoryRecord("4 2", finish_reason="stop"))], tokenizer, WIDE)
    assert row.response_ids == [ids, [*ids, tokenizer.eos_token_id]]
    assert row.truncated == [True, False]
    assert row.behaviour_logprobs == [list(mu), None]


def test_long_responses_are_cut_and_keep_their_reward(tokenizer):
    digits = "9 8 7 6 5"
    (ids,) = tokenizer([digits], add_special_tokens=False)["input_ids"]
    logprobs = tuple(-float(index) for index in range(len(ids)))
    group = make(TrajectoryRecord("x"), TrajectoryRecord(digits, logprobs=logprobs))
    # Exactly one token too few for EOS, then one token less than the text, then just enough.
    for limit, kept, cut in [(len(ids), ids, True), (len(ids) - 1, ids[:-1], True),
                             (len(ids) + 1, [*ids, tokenizer.eos_token_id], False)]:  # fmt: skip
        (row,) = rows([group], tokenizer, Limits(1000, limit))
        assert row.response_ids[1] == kept
        assert row.truncated == [False, cut]
        assert row.rewards == [0.0, 1.0]
        assert len(row.behaviour_logprobs[1]) == len(kept)
    assert row.behaviour_logprobs == [None, [*logprobs, 0.0]]


def test_logprobs_with_and_without_eos(tokenizer):
    (ids,) = tokenizer(["4"], add_special_tokens=False)["input_ids"]
    assert len(ids) == 1
    (row,) = rows(
        [make(TrajectoryRecord("4", logprobs=(-1.0,)), TrajectoryRecord("4", logprobs=(-1.0, -2.0)))], tokenizer, WIDE
    )
    assert row.behaviour_logprobs == [[-1.0, 0.0], [-1.0, -2.0]]
    (error,) = rows([make(TrajectoryRecord("4"), TrajectoryRecord("4", logprobs=(-1.0,) * 3))], tokenizer, WIDE)
    assert isinstance(error, RecordError)
    assert (error.reason, error.field, error.got) == (
        "log-probs of another length", "trajectories[1].logprobs", "3",
    )  # fmt: skip
    assert "1 (tokens of the text) or 2 (with its end)" in error.expected


def test_a_prompt_over_the_limit_drops_its_group_only(tokenizer):
    groups = [
        make(TrajectoryRecord("1")),
        make(TrajectoryRecord("2"), problem="Why? " * 50),
        make(TrajectoryRecord("3")),
    ]
    num_tokens = len(rows(groups[:1], tokenizer, WIDE)[0].prompt_ids)
    first, second, third = rows(groups, tokenizer, Limits(num_tokens, 1000))
    assert (first.texts, third.texts) == (["1"], ["3"])
    assert isinstance(second, RecordError)
    assert second.reason == "prompt too long"
    assert second.expected == f"at most {num_tokens} tokens"
    (dropped,) = rows(groups[:1], tokenizer, Limits(num_tokens - 1, 1000))
    assert isinstance(dropped, RecordError)


def test_a_template_that_refuses_drops_its_group(tmp_path):
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    strict = refusal + "{{ messages[0].content }}"
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "strict", chat_template=strict))
    refused, accepted = rows([make(TrajectoryRecord("1"), system="s"), make(TrajectoryRecord("2"))], tokenizer, WIDE)
    assert isinstance(refused, RecordError)
    assert refused.reason == "chat template refuses"
    assert "no system role" in refused.got
    assert accepted.texts == ["2"]


def test_unusable_tokenizers(tmp_path):
    with pytest.raises(DataError, match=r"has no chat template.*remedy"):
        load_tokenizer(save_tokenizer(tmp_path / "plain", chat_template=None))
    with pytest.raises(DataError, match="has no EOS token"):
        load_tokenizer(save_tokenizer(tmp_path / "endless", eos=None))
    with pytest.raises(DataError, match="cannot load the tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "text", "kept"),
    [
        ("Why?<think>\n", "<think>\nso 4</think>", "so 4</think>"),
        ("Why?<think>", "<think>\nso 4", "\nso 4"),
        ("Why?<think>\n", "<think> so 4", "so 4"),
        ("Why?<think>\n", "so 4", "so 4"),
        ("Why?", "<think>\nso 4", "<think>\nso 4"),
        ("<think>? Why?", "<think>\nso 4", "<think>\nso 4"),
        ("x", "<think>", "<think>"),
    ],
)
def test_a_thought_is_opened_once(prompt, text, kept):
    assert ThinkTags().continued(prompt, text) == kept


ADDS_A_SYSTEM_TEXT = (
    "{% if messages[0].role != 'system' %}<|system|>You are careful.{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}<|assistant|>"
)
THINKS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>{{ '<think>\\n' }}"
OPENS_WITH_BOS = "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|assistant|>"


@pytest.mark.parametrize(
    ("template", "prompt", "response"),
    [
        (ADDS_A_SYSTEM_TEXT, "<|system|>You are careful.<|user|>Why?<|assistant|>", "<think>\n4</think> so 4"),
        (THINKS, "<|user|>Why?<|assistant|><think>\n", "4</think> so 4"),
        (OPENS_WITH_BOS, "<|end|><|user|>Why?<|assistant|>", "<think>\n4</think> so 4"),
    ],
)
def test_the_response_is_exact_under_any_template(tmp_path, template, prompt, response):
    """Weights stand on response_ids and nowhere else: they are the response and EOS, whatever the template adds."""
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "tokenizer", chat_template=template))
    tokenizer.bos_token = "<|end|>"
    text = "<think>\n4</think> so 4"
    row, logged = rows([make(TrajectoryRecord(text)), make(with_logprobs(tokenizer, text))], tokenizer, WIDE)
    assert tokenizer.decode(row.prompt_ids) == prompt
    assert tokenizer.decode(row.response_ids[0]) == response + EOS
    assert row.response_ids[0].count(tokenizer.eos_token_id) == 1
    # Log-probs stand for the tokens of the text as it is, so that text stays as it is.
    assert tokenizer.decode(logged.response_ids[0]) == text + EOS
    # A tokenizer that would put BOS before every text does not put it before a response.
    assert row.response_ids[0][0] != tokenizer.bos_token_id


def with_logprobs(tokenizer, text):
    (ids,) = tokenizer([text], add_special_tokens=False)["input_ids"]
    return TrajectoryRecord(text, logprobs=(-1.0,) * len(ids))
