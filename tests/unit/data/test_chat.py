"""How conversations become tokens: the end of a turn, what a response continues, the template's variables."""

import pytest

from megatron_offgrpo.data.chat import FIXED_DATE, chat_format, decode, encode, question, render
from megatron_offgrpo.data.labelling import LabelledGroup
from megatron_offgrpo.data.thinking import ThinkTags
from megatron_offgrpo.data.tokenisation import Limits, load_tokenizer, token_counts, tokenise
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.types import GroupRecord, TrajectoryRecord
from tests.unit.data.tiny import SPECIAL_PIECES, save_sentencepiece, save_tokenizer

USER, ASSISTANT, END, EOS = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""As ChatML, Gemma, Phi: every turn ends in a token and a line break."""


def loaded(folder, template, eos=EOS):
    return load_tokenizer(save_tokenizer(folder, chat_template=template, eos=eos))


def group(*trajectories):
    record = GroupRecord("g", "Why?", "1", trajectories)
    return LabelledGroup(record, (1.0,) * len(trajectories), ("ok",) * len(trajectories))


def stored(chat, *trajectories):
    trajectories = [TrajectoryRecord(one) if isinstance(one, str) else one for one in trajectories]
    (row,) = tokenise([group(*trajectories)], chat, Limits(1000, 1000), ThinkTags())
    return row


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TURNS, END),
        (TURNS.replace("<|end|>\n", "<|end|>"), END),
        (TURNS.replace("{{ m.content }}<|end|>", "{{ m.content | trim }} <|end|>"), END),  # Llama 2 writes a space
        # Phi closes the last turn with both.
        (TURNS.replace("{% endif %}", "{% else %}<|pad|>{% endif %}"), END),
        ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>", EOS),  # closes no turn
        # The last turn is closed by another token than an earlier one (gpt-oss).
        (TURNS.replace("<|end|>", "{{ '<|pad|>' if loop.last else '<|end|>' }}"), EOS),
        ("{{ messages[0].content }}", EOS),
    ],
)  # fmt: skip
def test_the_end_of_a_turn_is_the_templates(tmp_path, template, end):
    chat = chat_format(loaded(tmp_path, template))
    assert chat.end_text == end
    said = [remark for remark in chat.remarks if "end of turn; the tokenizer's EOS is" in remark]
    assert said == ([f"responses end in {END}, the chat template's end of turn; the tokenizer's EOS is {EOS}"]
                    if end != EOS else [])  # fmt: skip
    assert stored(chat, "4").response_ids[0][-1] == chat.end


def test_a_template_that_closes_turns_by_plain_text_is_named(tmp_path):
    chat = chat_format(loaded(tmp_path, TURNS.replace("<|end|>", "<stop>")))
    assert chat.end_text == EOS
    assert chat.remarks == (
        "the chat template closes a turn by '<stop>', no token: responses end in the tokenizer's EOS",
    )


def test_templates_without_a_default_are_named(tmp_path):
    tokenizer = loaded(tmp_path, TURNS)
    tokenizer.chat_template = {"tools": TURNS, "rag": TURNS}
    with pytest.raises(DataError, match="no chat template to take"):
        chat_format(tokenizer)


def test_a_template_that_refuses_answers_is_named(tmp_path):
    template = "{% if messages | length > 1 %}{{ raise_exception('one question only') }}{% endif %}" + TURNS
    chat = chat_format(loaded(tmp_path, template))
    assert chat.end_text == EOS
    assert "one question only" in chat.remarks[0]


@pytest.mark.parametrize(
    "text",
    [
        "4",
        "4<|end|>",
        "4<|end|>\n",
        "4<|end|> \n\n",
        "4<|end|>\n<|end|>",
        "4<|pad|>",
        "4<|pad|>\n",
        "4<|end|>\n<|pad|>",
    ],
)
def test_a_response_ends_once(tmp_path, text):
    chat = chat_format(loaded(tmp_path, TURNS))
    (ids,) = encode(chat.tokenizer, ["4"])
    row = stored(chat, text, TrajectoryRecord(text, finish_reason="length"))
    assert row.response_ids[0] == [*ids, chat.end]
    assert chat.tokenizer.decode(row.response_ids[1]) == text  # cut by its generator: as it is
    assert token_counts([group(TrajectoryRecord(text))], chat, ThinkTags()) == [[len(ids) + 1]]


def test_white_space_before_the_end_and_turns_inside_stay(tmp_path):
    chat = chat_format(loaded(tmp_path, TURNS))
    for text in ("4\n<|end|>", "4 \n", "4<|end|>\n<|user|>\nAnd 5?", "<|end|>"):
        whole = text if text.endswith(END) else text + END
        assert chat.tokenizer.decode(stored(chat, text).response_ids[0]) == whole


@pytest.mark.parametrize(
    ("text", "given", "mu"),
    [
        ("4<|end|>", (-1.0, -2.0), [-1.0, -2.0]),
        ("4<|end|>\n", (-1.0, -2.0, -3.0), [-1.0, -2.0]),  # of the tokens of the text
        ("4<|end|>\n", (-1.0, -2.0), [-1.0, -2.0]),  # of what is stored
        ("4<|pad|>", (-1.0, -2.0), [-1.0, 0.0]),  # another end stands in the place of the sampled one
        ("4<|pad|>\n", (-1.0, -2.0, -3.0), [-1.0, 0.0]),
        ("4", (-1.0, -2.0), [-1.0, -2.0]),
        ("4", (-1.0,), [-1.0, 0.0]),
    ],
)
def test_logprobs_of_responses_with_an_end_of_their_own(tmp_path, text, given, mu):
    chat = chat_format(loaded(tmp_path, TURNS))
    row = stored(chat, TrajectoryRecord(text, logprobs=given))
    assert row.behaviour_logprobs == [mu]
    assert len(row.response_ids[0]) == len(mu)


TEXTS = ["The sum is 7.", "the sum", "\nSo 7.", " So 7.", "7", "\\boxed{7}", "", "<|user|>The sum", "  So"]
AFTER_A_LINE_BREAK = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ '<|end|>' if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
AFTER_A_TOKEN = AFTER_A_LINE_BREAK.replace("|>\n", "|>")
AFTER_A_SPACE = (
    "{% for m in messages %}{% if m.role == 'user' %}[I] {{ m.content }} [/I]{% else %} {{ m.content }}<|end|>"
    "{% endif %}{% endfor %}"
)
AFTER_A_COLON = (
    "{% for m in messages %}{{ 'U: ' if m.role == 'user' else 'A:' }}{{ m.content }}"
    "{{ '<|end|>' if m.role == 'assistant' }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


@pytest.mark.parametrize("template", [AFTER_A_LINE_BREAK, AFTER_A_TOKEN, AFTER_A_SPACE, AFTER_A_COLON])
@pytest.mark.parametrize("kind", ["everywhere", "first", "bytes"])
def test_responses_are_tokenised_as_the_template_continues_them(tmp_path, kind, template):
    """Three ways to put a space before a text: Llama 2's, Mistral's, that of byte-level tokenizers with a prefix."""
    tokenizer = load_tokenizer(save_sentencepiece(tmp_path, kind, template))
    chat = chat_format(tokenizer)
    assert chat.space_first
    for text in TEXTS:
        whole = render(tokenizer, [*question("Why?", None), {"role": "assistant", "content": text}], {},
                       to_response=False)  # fmt: skip
        row = stored(chat, text)
        (ids,) = encode(tokenizer, [whole])
        (prompt,) = encode(tokenizer, [chat.prompt("Why?", None)])
        assert row.prompt_ids == prompt
        if template is AFTER_A_SPACE and (not text or text.startswith(" ")):
            continue  # nothing but an end of turn; or the response brings the space that the template writes
        if text.startswith(" ") and template is AFTER_A_COLON and ids[: len(prompt)] != prompt:
            # Colon and space would be one token, but the prompt's ids are fixed.
            assert decode(tokenizer, prompt, row.response_ids[0][:-1]) == text
            continue
        assert prompt == ids[: len(prompt)]
        assert row.response_ids[0] == ids[len(prompt) : len(prompt) + len(row.response_ids[0])], text
        assert row.response_ids[0][-1] == chat.end


def test_no_space_before_a_response(tmp_path):
    tokenizer = load_tokenizer(save_sentencepiece(tmp_path, "everywhere", AFTER_A_LINE_BREAK))
    (alone,) = encode(tokenizer, ["The sum"])
    first = tokenizer.convert_ids_to_tokens([alone[0], stored(chat_format(tokenizer), "The sum").response_ids[0][0]])
    assert (first[0][0], first[1][0]) == ("▁", "T")


def test_the_space_that_a_template_writes_is_tokenised_once(tmp_path):
    chat = chat_format(load_tokenizer(save_sentencepiece(tmp_path, "everywhere", AFTER_A_SPACE)))
    assert chat.gap == " "
    assert stored(chat, " So 7.").response_ids == stored(chat, "So 7.").response_ids
    # Log-probs belong to the text as it is.
    (ids,) = chat.response_ids([chat.prompt("Why?", None)], ["So 7."])
    exact = stored(chat, TrajectoryRecord("So 7.", logprobs=(-1.0,) * len(ids)))
    assert exact.response_ids == [[*ids, chat.end]]


def test_byte_level_tokenizers_give_what_they_always_gave(tmp_path):
    chat = chat_format(loaded(tmp_path, TURNS))
    assert not chat.space_first
    assert chat.response_ids(["any prompt"] * len(TEXTS), TEXTS) == encode(chat.tokenizer, TEXTS)


@pytest.mark.parametrize("kind", ["everywhere", "first", "bytes"])
def test_a_prompts_last_section_is_context_enough(tmp_path, kind):
    chat = chat_format(load_tokenizer(save_sentencepiece(tmp_path, kind, AFTER_A_LINE_BREAK)))
    prompt = chat.prompt("The sum is 3. Is the sum 4?", "So <|user|> is no one.")
    assert chat._last_section(prompt) == "<|assistant|>\n"
    assert chat._last_section("no token") == "no token"
    for text in TEXTS:
        head, whole = encode(chat.tokenizer, [prompt, prompt + text])
        assert chat.response_ids([prompt], [text]) == [whole[len(head) :]]


def test_a_prompt_that_would_merge_with_its_response(tmp_path):
    """The ids of a prompt are fixed, so the response may not change them, nor get a space of its own."""
    chat = chat_format(load_tokenizer(save_sentencepiece(tmp_path, "first", AFTER_A_LINE_BREAK)))
    prompt = "Then the s"
    head, whole = encode(chat.tokenizer, [prompt, prompt + "um is"])
    assert whole[: len(head)] != head
    (ids,) = chat.response_ids([prompt], ["um is"])
    assert "".join(chat.tokenizer.convert_ids_to_tokens(ids)) == "um▁is"


def test_a_tokenizer_that_merges_everything_is_refused():
    class Merging:
        eos_token_id = 0

        def __call__(self, texts, **_):
            return {"input_ids": [[hash(text)] for text in texts]}

    from megatron_offgrpo.data.chat import ChatFormat

    with pytest.raises(DataError, match=r"merges this response with its prompt; got So 7"):
        ChatFormat(Merging(), {}, end=0, space_first=True).response_ids(["p"], ["So 7"])


@pytest.mark.parametrize("kind", ["everywhere", "first", "bytes"])
def test_texts_of_responses_come_back(tmp_path, kind):
    chat = chat_format(load_tokenizer(save_sentencepiece(tmp_path, kind, AFTER_A_LINE_BREAK)))
    prompt = chat.prompt("Why?", None)
    (before,) = encode(chat.tokenizer, [prompt])
    for text, ids in zip(TEXTS, chat.response_ids([prompt] * len(TEXTS), TEXTS), strict=True):
        if USER not in text:  # a space stands before each section after a special token, whether or not it was there
            assert decode(chat.tokenizer, before, ids) == text


CLOCK = "{{ strftime_now('%d %b %Y') }}|" + TURNS
SWITCH = "{% if enable_thinking is defined and not enable_thinking %}quick|{% endif %}" + TURNS


def test_variables_of_the_template(tmp_path):
    tokenizer = loaded(tmp_path, SWITCH)
    assert chat_format(tokenizer).prompt("Why?", None).startswith(USER)
    assert chat_format(tokenizer, {"enable_thinking": False}).prompt("Why?", None).startswith("quick|")
    with pytest.raises(
        ConfigError, match=r"chat_template_kwargs\.enable_thinkin: the chat template has no such variable"
    ):
        chat_format(tokenizer, {"enable_thinkin": False})
    for name in ("messages", "add_generation_prompt", "tokenize"):
        with pytest.raises(ConfigError, match=rf"chat_template_kwargs\.{name}: is set by the program itself"):
            chat_format(tokenizer, {name: []})


def test_a_template_that_asks_for_the_clock_gets_a_fixed_date(tmp_path):
    tokenizer = loaded(tmp_path, CLOCK)
    chat = chat_format(tokenizer)
    assert chat.prompt("Why?", None).startswith("26 Jul 2024|")
    assert chat.variables == {"strftime_now": FIXED_DATE}
    assert any("it is given 2024-07-26" in remark for remark in chat.remarks)
    chosen = chat_format(tokenizer, {"strftime_now": "2025-12-31"})
    assert chosen.prompt("Why?", None).startswith("31 Dec 2025|")
    with pytest.raises(ConfigError, match=r"strftime_now: no date; expected a date such as 2025-12-31; got tomorrow"):
        chat_format(tokenizer, {"strftime_now": "tomorrow"})
    assert chat_format(loaded(tmp_path / "other", TURNS)).variables == {}


def test_special_pieces_are_known(tmp_path):
    chat = chat_format(load_tokenizer(save_sentencepiece(tmp_path, "first", AFTER_A_LINE_BREAK)))
    assert set(SPECIAL_PIECES) <= set(chat.special)
