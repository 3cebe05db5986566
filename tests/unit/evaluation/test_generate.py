"""Solutions with log-probs: when the log-probs of the sampled ids fit the text, and what is kept where they do not."""

import pytest

from megatron_offgrpo.data.chat import ChatFormat, chat_format
from megatron_offgrpo.errors import DataError
from megatron_offgrpo.evaluation.generate import describe
from megatron_offgrpo.evaluation.generation import Completion
from tools.base_student import make_tokenizer


class Merging:
    """Ids 1 "a", 2 "b", 3 "ab", 9 EOS, 8 another end token; the tokenizer always merges a and b."""

    eos_token_id = 9
    pieces = {1: "a", 2: "b", 3: "ab", 8: "<end>", 9: "<eos>"}  # noqa: RUF012

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert not skip_special_tokens
        return "".join(self.pieces[token] for token in ids)

    def __call__(self, texts, **_):
        return {"input_ids": [self.ids(text) for text in texts]}

    def ids(self, text):
        ids, names = [], {name: token for token, name in self.pieces.items()}
        while text:
            name = max((name for name in names if text.startswith(name)), key=len)
            ids.append(names[name])
            text = text[len(name) :]
        return ids


STOP = (8, 9)


@pytest.mark.parametrize(
    ("ids", "reason", "text", "logprobs", "dropped"),
    [
        ((3, 1, 9), "stop", "aba", [-0.1, -0.2, -0.3], False),  # EOS and its log-prob belong to the store's ids
        ((3, 1, 8), "stop", "aba", [-0.1, -0.2], False),  # the store ends in EOS, which was not sampled
        ((3, 1, 1), "length", "abaa", [-0.1, -0.2, -0.3], False),
        ((1, 2, 9), "stop", "ab", None, True),  # two ids, and the text gives one
        ((2, 1, 2), "length", "bab", None, True),
        ((9,), "stop", "", [-0.1], False),
        ((), "stop", "", [], False),
        ((1, 3, 2), "length", "aabb", [-0.1, -0.2, -0.3], False),
    ],
)
def test_logprobs_are_kept_where_the_text_gives_the_sampled_ids(ids, reason, text, logprobs, dropped):
    done = Completion(ids, reason, tuple(-0.1 * number for number in range(1, len(ids) + 1)))
    found = describe(done, ChatFormat(Merging(), {}, end=9), "", STOP)
    assert found["text"] == text
    assert found["logprobs"] == (None if logprobs is None else pytest.approx(logprobs))
    assert (found["dropped"] is not None) == dropped


def test_as_many_ids_are_not_enough():
    class Swapping(Merging):
        def ids(self, text):
            return [2, 1] if text == "aa" else []

    assert (
        describe(Completion((1, 1), "length", (-0.1, -0.2)), ChatFormat(Swapping(), {}, end=9), "", STOP)["logprobs"]
        is None
    )


def test_rounding_above_zero_is_no_probability_above_one():
    assert describe(Completion((1, 9), "stop", (1e-7, -0.0)), ChatFormat(Merging(), {}, end=9), "", STOP)[
        "logprobs"
    ] == [0.0, 0.0]


def test_a_server_without_ids_makes_no_groups():
    with pytest.raises(DataError, match="no token ids or log-probs"):
        describe(Completion((), "stop", None, "text", 3), ChatFormat(Merging(), {}, end=9), "", STOP)


def test_a_real_tokenizer_gives_ordinary_text_back():
    tokenizer = make_tokenizer(0)
    ids = tokenizer("So Tom has 3+4=7. The answer is \\boxed{7}.", add_special_tokens=False)["input_ids"]
    done = Completion((*ids, tokenizer.eos_token_id), "stop", (-0.5,) * (len(ids) + 1))
    found = describe(done, chat_format(tokenizer), "", (tokenizer.eos_token_id,))
    assert (len(found["logprobs"]), found["dropped"]) == (len(ids) + 1, None)
