"""Converted models compute the logits of Transformers in every layout, and continue a prompt as the original does."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints_conversion import hf_to_megatron, megatron_to_hf
from checkpoints_conversion.hf_reader import HfWeights
from tests.distributed.harness import run_ranks
from tests.unit.conversion.tiny_models import MODELS, VOCAB, save_tiny_model

TOLERANCE = 1e-4
IDS = torch.randint(0, VOCAB, (48,), generator=torch.Generator().manual_seed(3)).tolist()
MOE = ("qwen3_moe", "qwen3_moe_raw_probs", "mixtral")
LAYOUTS = {"tp1": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "tp2_pp2": {"tp": 2, "pp": 2}}
CASES = [(model, name, layout) for model in MODELS for name, layout in LAYOUTS.items() if model not in MOE]
CASES += [(model, name, LAYOUTS[name]) for model in MOE for name in ("tp1", "pp2")]
CASES += [(model, "ep2", {"ep": 2}) for model in MOE]
CASES += [("qwen3_moe", "ep2_pp2", {"ep": 2, "pp": 2}), ("qwen2_tied", "vpp2", {"pp": 2, "vpp": 2})]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Every tiny model in fp32, converted."""
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        save_tiny_model(name, folder / name / "hf")
        hf_to_megatron(folder / name / "hf", folder / name / "megatron")
    return folder


@pytest.fixture(scope="module")
def megatron_logits(models, tmp_path_factory) -> Path:
    """Logits of all cases, computed in one start of processes per number of processes."""
    output = tmp_path_factory.mktemp("logits")
    for world_size in (1, 2, 4):
        cases = [
            {
                "name": f"{model}-{name}",
                "hf": str(models / model / "hf"),
                "megatron": str(models / model / "megatron"),
                "layout": layout,
            }
            for model, name, layout in CASES
            if layout.get("tp", 1) * layout.get("pp", 1) * layout.get("ep", 1) == world_size
        ]
        run_ranks(
            "tests.parity.conversion_worker:write_logits",
            world_size,
            timeout_seconds=560,
            cases=cases,
            ids=IDS,
            output=str(output),
        )
    return output


@pytest.fixture(scope="module")
def hf_logits(models) -> dict[str, torch.Tensor]:
    """Logits of Transformers in fp32."""
    logits = {}
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(models / name / "hf", dtype=torch.float32).eval()
        with torch.no_grad():
            logits[name] = model(torch.tensor([IDS])).logits[0]
    return logits


@pytest.mark.parametrize(("model", "layout"), [(model, name) for model, name, _ in CASES])
def test_logits_equal_transformers(model, layout, megatron_logits, hf_logits):
    ours = torch.load(megatron_logits / f"{model}-{layout}.pt", weights_only=True)
    theirs = hf_logits[model]
    assert ours.shape == theirs.shape == (len(IDS), VOCAB)
    assert theirs.std() > 0.1, "the logits must differ enough for the tolerance to mean something"
    assert (ours - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", list(MODELS))
def test_greedy_continuation_after_the_round_trip(name, models, tmp_path):
    megatron_to_hf(models / name / "megatron", models / name / "hf", tmp_path / "hf")
    prompt = torch.tensor([IDS[:16]])
    continuations = []
    for folder in (models / name / "hf", tmp_path / "hf"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        continuations.append(model.generate(prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False)[0])
    assert continuations[0].shape == (16 + 64,)
    assert torch.equal(continuations[0], continuations[1])
    assert HfWeights(tmp_path / "hf").tensors.keys() == HfWeights(models / name / "hf").tensors.keys()
