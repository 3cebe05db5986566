"""The base student's tokenizer, and the shipped model's shape; its accuracy is measured in the system tests."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.base_student import END, IGNORED, SHIPPED, VOCAB_SIZE, main, make_batch, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ("Ana has 20+15=35. So the answer is \\boxed{35}.", "É 中文 \t\n x² ≤ 7", "  two  spaces "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_stay_single(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("12+345=357"))
    assert tokens == ["1", "2", "+", "3", "4", "5", "=", "3", "5", "7"]


def test_chat_template(tokenizer):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text))[0] == "<|im_start|>"
    assert tokenizer.eos_token == END


def test_shipped_tokenizer_is_the_one_the_command_makes(tokenizer):
    made = make_tokenizer(0)
    assert made.get_vocab() == tokenizer.get_vocab()
    assert made.chat_template == tokenizer.chat_template
    text = "Kim has 31 marbles. That is 11 more than Mia has."
    assert made.encode(text) == tokenizer.encode(text)


def test_shipped_model_fits_every_part_of_the_pipeline(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(SHIPPED)
    config = model.config
    assert config.model_type == "qwen2"
    assert config.hidden_size // config.num_attention_heads == 32
    assert config.vocab_size == len(tokenizer) == VOCAB_SIZE == model.lm_head.weight.shape[0]
    assert config.num_key_value_heads % 2 == config.num_hidden_layers % 2 == 0
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 4 * 2**20


def test_only_the_response_is_learned(tokenizer):
    import random

    ids, mask, labels = make_batch(tokenizer, random.Random(0), 4, 0.5)
    assert ids.shape == mask.shape == labels.shape
    for row in range(4):
        learned = labels[row] != IGNORED
        text = tokenizer.decode(ids[row][learned])
        assert "=" in text.split(" ", 1)[1]
        assert text.endswith("}.<|im_end|>")
        assert not torch.any(learned & (mask[row] == 0))
        assert tokenizer.decode(ids[row][~learned & (mask[row] == 1)]).endswith("<|im_start|>assistant\n")


def test_training_is_reproducible_to_the_byte(tmp_path):
    threads = torch.get_num_threads()
    for name in "ab":
        assert main(["--output", str(tmp_path / name), "--steps", "2", "--batch", "2"]) == 0
    torch.set_num_threads(threads)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"


def test_zero_steps_are_refused(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "x"), "--steps", "0"]) == 2
    assert "--steps: must be at least 1" in capsys.readouterr().err
