"""Settings, seeds, prompts and the Hugging Face back end's seeded sampling."""

import hashlib
import json

import pytest
import torch

from megatron_offgrpo.data.tokenisation import load_tokenizer
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.evaluation import generation
from megatron_offgrpo.evaluation.generation import (
    Request,
    SamplingSettings,
    Shaping,
    choose_backend,
    seed_of,
    stop_token_ids,
)
from megatron_offgrpo.evaluation.hf_sampling import Penalties, SeededSampling, processors_of
from tests.unit.data.tiny import TEMPLATE, save_tokenizer


def draw(settings, logits, num):
    """`num` independent draws from one row of logits."""
    scores = torch.tensor([logits]).repeat(num, 1)
    return SeededSampling(settings, range(num))(None, scores).argmax(dim=-1)


def test_sampling_follows_the_softmax_at_its_temperature():
    # logits (ln 4, 0) at temperature 2: p = 2 / (2 + 1).
    drawn = draw(SamplingSettings(temperature=2.0, top_p=1.0), [1.3862944, 0.0], 6000)
    assert (drawn == 0).float().mean().item() == pytest.approx(2 / 3, abs=0.02)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = torch.tensor([0.2, 0.5, 0.3]).log().tolist()
    # 0.5 alone reaches 0.45; 0.5 + 0.3 reaches 0.6, drawn as 5/8 and 3/8; all three are needed for 0.9.
    assert draw(SamplingSettings(1.0, 0.45), logits, 500).unique().tolist() == [1]
    drawn = draw(SamplingSettings(1.0, 0.6), logits, 6000)
    assert drawn.unique().tolist() == [1, 2]
    assert (drawn == 1).float().mean().item() == pytest.approx(5 / 8, abs=0.02)
    assert draw(SamplingSettings(1.0, 0.9), logits, 500).unique().tolist() == [0, 1, 2]


def test_a_row_does_not_depend_on_the_others():
    settings, scores = SamplingSettings(1.0, 0.9), torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = SeededSampling(settings, [5, 6, 7])(None, scores)
    alone = SeededSampling(settings, [6])(None, scores[1:2])
    assert torch.equal(together[1], alone[0])


def test_seeds_differ_by_problem_sample_and_seed_and_stay_in_range():
    seeds = [seed_of(s, p, k) for s in (0, 1) for p in ("a", "b", "a/0") for k in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(0, "a", 3) == int.from_bytes(hashlib.sha256(b"0/a/3").digest()[:4], "little") // 2


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": 0.001}, "temperature"),  # vLLM would take 0.01
        ({"temperature": float("nan")}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_impossible_settings_are_refused(values, field):
    with pytest.raises(ConfigError, match=rf"^{field}: out of range; expected .*; got {next(iter(values.values()))}$"):
        SamplingSettings(**values)


@pytest.mark.parametrize(
    ("field", "value"),
    [("top_k", -1), ("min_p", 1.1), ("min_p", -0.1), ("repetition_penalty", 0.0), ("repetition_penalty", 2.1),
     ("presence_penalty", -2.1), ("frequency_penalty", 2.1)],
)  # fmt: skip
def test_impossible_shapings_are_refused(field, value):
    with pytest.raises(ConfigError, match=rf"^{field}: out of range; expected .*; got {value}$"):
        Shaping(**{field: value})


P = torch.tensor([0.1, 0.4, 0.3, 0.2]).log().tolist()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (SamplingSettings(1.0, 1.0, shaping=Shaping(top_k=2)), [1, 2]),
        (SamplingSettings(1.0, 1.0, shaping=Shaping(top_k=9)), [0, 1, 2, 3]),
        (SamplingSettings(1.0, 1.0, shaping=Shaping(min_p=0.6)), [1, 2]),  # 0.6 of 0.4 is 0.24
        (
            SamplingSettings(2.0, 1.0, shaping=Shaping(min_p=0.6)),
            [1, 2, 3],
        ),  # at T = 2 of its root: 0.379; 0.2 has 0.447
        (SamplingSettings(1.0, 1.0, shaping=Shaping(min_p=1.0)), [1]),
        # Of the three that top-k leaves 4/9 and 3/9 reach 0.75.
        (SamplingSettings(1.0, 0.75, shaping=Shaping(top_k=3)), [1, 2]),
        (SamplingSettings(1.0, 0.85, shaping=Shaping(top_k=3)), [1, 2, 3]),
    ],
)
def test_top_k_and_min_p(settings, kept):
    assert draw(settings, P, 2000).unique().tolist() == kept


def penalised(shaping, prompts, drawn, width, scores):
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt + drawn for prompt in prompts])
    return Penalties(shaping, prompts, width)(ids, torch.tensor([scores] * len(prompts)))


def test_penalties_by_hand():
    scores = [2.0, -2.0, 1.0, -1.0]
    # Repetition: tokens of the prompt (3) and of the response (1, 1, 2); the padding (0) is neither.
    found = penalised(Shaping(repetition_penalty=2.0), [[3]], [1, 1, 2], 3, scores)
    assert found.tolist() == [[2.0, -4.0, 0.5, -2.0]]
    # Presence and frequency: of the response alone.
    assert penalised(Shaping(presence_penalty=0.5), [[3]], [1, 1, 2], 3, scores).tolist() == [[2.0, -2.5, 0.5, -1.0]]
    assert penalised(Shaping(frequency_penalty=0.5), [[3]], [1, 1, 2], 3, scores).tolist() == [[2.0, -3.0, 0.5, -1.0]]
    rows = penalised(Shaping(repetition_penalty=2.0), [[3], [0, 3]], [], 2, scores)
    assert rows.tolist() == [[2.0, -2.0, 1.0, -2.0], [1.0, -2.0, 1.0, -2.0]]


def test_neutral_settings_add_no_penalties():
    names = [type(one).__name__ for one in processors_of(SamplingSettings(), [Request((1,), 0)], 1)]
    assert names == ["SeededSampling"]
    assert list(processors_of(SamplingSettings(0.0), [Request((1,), 0)], 1)) == []


def test_end_tokens_are_those_of_both_configurations_the_tokenizer_and_the_template(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path))
    eos, other = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|pad|>")
    assert stop_token_ids(tmp_path, tokenizer) == (eos,)
    named = {"config.json": {"eos_token_id": [eos, 7]}, "generation_config.json": {"eos_token_id": 9}}
    for name, values in named.items():
        (tmp_path / name).write_text(json.dumps(values))
    assert stop_token_ids(tmp_path, tokenizer) == tuple(sorted({eos, 7, 9}))
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 8}, "eos_token_id": None}))
    assert stop_token_ids(tmp_path, tokenizer) == tuple(sorted({eos, 8}))
    turns = TEMPLATE.replace("{% endfor", "<|pad|>{% endfor")
    tokenizer.chat_template = turns
    assert stop_token_ids(tmp_path, tokenizer) == tuple(sorted({eos, 8, other}))
    tokenizer.chat_template = None
    assert stop_token_ids(tmp_path, tokenizer) == tuple(sorted({eos, 8}))
    for values, what in (({"eos_token_id": "</s>"}, "no token ids"), ({"eos_token_id": True}, "no token ids"),
                         ([1], "damaged"), ("{", "damaged")):  # fmt: skip
        (tmp_path / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))
        with pytest.raises(DataError, match=rf"config\.json.*{what}"):
            stop_token_ids(tmp_path, tokenizer)


def test_auto_takes_vllm_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(generation.importlib.util, "find_spec", lambda name: object())
    assert choose_backend("auto") == "vllm"
    monkeypatch.setattr(generation.importlib.util, "find_spec", lambda name: None)
    assert choose_backend("auto") == "hf"
    with pytest.raises(ConfigError, match="not installed"):
        choose_backend("vllm")
    with pytest.raises(ConfigError, match="unknown back end"):
        choose_backend("sglang")
