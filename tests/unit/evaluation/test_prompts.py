"""Prompt templates: the texts as published, and the model's own chat template."""

import pytest
from tokenizers import processors

from megatron_offgrpo.errors import DataError
from megatron_offgrpo.evaluation.prompts import encode_prompt, load_prompt_tokenizer, prompt_text
from tests.unit.data.tiny import EOS, SPECIAL, save_tokenizer
from tools.base_student import make_tokenizer


class FakeTokenizer:
    """A template that writes roles and contents; ids are code points."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(f"{m['role']}:{m['content']};" for m in messages) + "assistant:" * add_generation_prompt

    def encode(self, text, add_special_tokens):
        return ([0] if add_special_tokens else []) + [ord(character) for character in text]


def decoded(ids):
    return "".join(map(chr, ids))


def test_prompt_is_the_chat_template_up_to_the_response():
    assert decoded(encode_prompt(FakeTokenizer(), "1+1?", None)) == "user:1+1?;assistant:"
    assert decoded(encode_prompt(FakeTokenizer(), "1+1?", "Be brief.")) == "system:Be brief.;user:1+1?;assistant:"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "qwen-math",
            "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
            "<|im_start|>user\n{1+1}?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "simplerl",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{1+1}?\nPlease reason "
            "step by step, and put your final answer within\\boxed{{}}.<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("none", "{1+1}?"),
    ],
)
def test_published_texts(template, expected):
    assert prompt_text(None, "{1+1}?", None, template) == expected


def test_prime_asks_for_a_box_and_ends_with_the_assistant():
    text = prompt_text(None, "{1+1}?", None, "prime")
    assert text.startswith("A conversation between User and Assistant. The user asks a question,")
    assert text.endswith("User: {1+1}?\n\nPresent the answer in LaTex format: \\boxed{Your answer}. Assistant:")


def test_plain_texts_get_the_tokenizers_own_start_token_and_templates_do_not():
    assert encode_prompt(FakeTokenizer(), "ab", None, "none") == (0, ord("a"), ord("b"))
    assert encode_prompt(FakeTokenizer(), "ab", None, "qwen-math")[0] == ord("<")


def test_a_fixed_template_takes_no_system_message():
    with pytest.raises(DataError, match="its own system text"):
        prompt_text(None, "p", "Be brief.", "qwen-math")


def test_only_the_chat_template_needs_one_in_the_tokenizer(tmp_path):
    tokenizer = make_tokenizer(0)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="no chat template"):
        load_prompt_tokenizer(tmp_path, "chat")
    assert load_prompt_tokenizer(tmp_path, "none").eos_token_id == tokenizer.eos_token_id
    with pytest.raises(DataError, match="cannot load the tokenizer"):
        load_prompt_tokenizer(tmp_path / "absent", "none")


@pytest.mark.parametrize(("single", "before"), [("$A </s>", []), ("<s> $A </s>", ["<s>"]), ("<s> $A", ["<s>"])])
def test_no_end_token_closes_a_prompt(tmp_path, single, before):
    """A tokenizer that closes every text by EOS, or brackets it, as those of models for embeddings or translation."""
    tokenizer = load_prompt_tokenizer(save_tokenizer(tmp_path), "chat")
    names = {"<s>": SPECIAL[0], "</s>": EOS}
    ids = [(name, tokenizer.convert_tokens_to_ids(text)) for name, text in names.items()]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    assert (tokenizer.encode("1 + 1?")[-1] == tokenizer.eos_token_id) == single.endswith("</s>")
    plain = tokenizer.encode("1 + 1?", add_special_tokens=False)
    start = [tokenizer.convert_tokens_to_ids(names[name]) for name in before]
    assert encode_prompt(tokenizer, "1 + 1?", None, "none") == (*start, *plain)
    prime = encode_prompt(tokenizer, "1 + 1?", None, "prime")
    assert (list(prime[: len(start)]), prime[-1] != tokenizer.eos_token_id) == (start, True)
    assert encode_prompt(tokenizer, "1 + 1?", None)[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")
    # What the text itself ends in is the text's own.
    assert encode_prompt(tokenizer, "1" + EOS, None, "none")[-1] == tokenizer.eos_token_id


def test_special_tokens_that_change_the_text_are_refused():
    class Odd(FakeTokenizer):
        def encode(self, text, add_special_tokens):
            return [1, 2, 3] if add_special_tokens else [5]

    with pytest.raises(DataError, match="special tokens change the text"):
        encode_prompt(Odd(), "ab", None, "none")
