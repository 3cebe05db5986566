"""Settings, seeds, prompts and the Hugging Face back end's seeded sampling."""

import hashlib

import pytest
import torch

from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.evaluation import generation
from megatron_offgrpo.evaluation.generation import SamplingSettings, choose_backend, seed_of
from megatron_offgrpo.evaluation.hf_sampling import SeededSampling


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
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_impossible_settings_are_refused(values, field):
    with pytest.raises(ConfigError, match=field):
        SamplingSettings(**values)


def test_auto_takes_vllm_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(generation.importlib.util, "find_spec", lambda name: object())
    assert choose_backend("auto") == "vllm"
    monkeypatch.setattr(generation.importlib.util, "find_spec", lambda name: None)
    assert choose_backend("auto") == "hf"
    with pytest.raises(ConfigError, match="not installed"):
        choose_backend("vllm")
    with pytest.raises(ConfigError, match="unknown back end"):
        choose_backend("sglang")
