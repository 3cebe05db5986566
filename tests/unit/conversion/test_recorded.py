"""A checkpoint records its architecture, and every field of it is compared."""

import json
import shutil
from argparse import Namespace
from dataclasses import asdict, fields, replace

import pytest
import torch

from checkpoints_conversion import changed_weights, hf_to_megatron, megatron_to_hf, verify
from checkpoints_conversion.safe_metadata import read_common
from megatron_offgrpo.artifacts import MANIFEST
from megatron_offgrpo.errors import CheckpointError
from megatron_offgrpo.model.hf_config import Architecture, Experts, architecture_differences, read_architecture
from tests.unit.conversion.tiny_models import save_tiny_model

ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# model -> changes of its config.json that leave every shape as it is, and the name that is said
CHANGES = [
    ("qwen2", {"rope_theta": 5e5, "rope_parameters": None}, "rope.rope_theta: 500000.0 and 10000.0"),
    ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}, "rope.rope_theta: 20000.0 and 10000.0"),
    ("qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope.rope_type"),
    ("qwen2", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope.factor: 4.0 and none"),
    ("qwen2", {"rms_norm_eps": 1e-5}, "rms_norm_eps: 1e-05 and 1e-06"),
    ("qwen2", {"max_position_embeddings": 512}, "max_position_embeddings: 512 and 256"),
    ("qwen2", {"initializer_range": 0.02}, "initializer_range: 0.02 and 0.15"),
    ("llama_linear_rope", {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 24}, "head_dim: 24 and 12"),
    (
        "llama3_tied",
        {"rope_parameters": {**ROPE, "original_max_position_embeddings": 64}},
        "rope.original_max_position_embeddings: 64 and 32",
    ),
    (
        "llama3_tied",
        {"rope_parameters": {**ROPE, "factor": 4.0, "original_max_position_embeddings": 32}},
        "rope.factor",
    ),
    ("qwen3_moe", {"num_experts_per_tok": 3}, "num_experts_per_tok: 3 and 2"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob: False and True"),
    ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok: 1 and 2"),
]
# Of these Megatron-LM's arguments say nothing.
UNKNOWN_TO_MEGATRON = ("max_position_embeddings", "initializer_range", "original_max_position_embeddings")


def change(hf, **changes):
    path = hf / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Folder of each model, converted."""
    folder = tmp_path_factory.mktemp("converted")
    for name in {model for model, _, _ in CHANGES}:
        hf_to_megatron(save_tiny_model(name, folder / name / "hf"), folder / name / "megatron")
        assert verify(folder / name / "hf", folder / name / "megatron", compare_logits=False).ok
    return folder


@pytest.mark.parametrize(("model", "changes", "said"), CHANGES)
def test_the_same_weights_with_another_architecture_are_not_equal(model, changes, said, converted, tmp_path):
    hf = shutil.copytree(converted / model / "hf", tmp_path / "hf")
    change(hf, **changes)
    found = verify(hf, converted / model / "megatron", compare_logits=False)
    assert not found.ok
    # The rows of queries, keys and values are ordered by heads.
    assert bool(found.differing_tensors) == ("head_dim" in changes)
    assert f"differs: {said}" in found.describe()
    assert found.describe().splitlines()[-1] == "NOT equal"
    with pytest.raises(CheckpointError, match=r"not that of this checkpoint(.|\n)*made from"):
        megatron_to_hf(converted / model / "megatron", hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="the two models have different architectures"):
        changed_weights(hf, converted / model / "hf")


@pytest.mark.parametrize(("model", "changes", "said"), CHANGES)
def test_a_checkpoint_of_megatron_lm_is_compared_by_its_arguments(model, changes, said, converted, tmp_path):
    foreign = shutil.copytree(converted / model / "megatron", tmp_path / "foreign")
    (foreign / "release" / MANIFEST).unlink()
    same = verify(converted / model / "hf", foreign, compare_logits=False)
    assert same.ok
    assert "architecture equal" in same.describe()
    hf = shutil.copytree(converted / model / "hf", tmp_path / "hf")
    change(hf, **changes)
    assert verify(hf, foreign, compare_logits=False).ok == any(name in said for name in UNKNOWN_TO_MEGATRON)


def test_what_is_not_recorded_is_said(converted, tmp_path):
    foreign = shutil.copytree(converted / "qwen2" / "megatron", tmp_path / "foreign")
    (foreign / "release" / MANIFEST).unlink()
    common = read_common(foreign / "release")
    assert isinstance(common.pop("args"), Namespace)
    torch.save(common, foreign / "release" / "common.pt")
    found = verify(converted / "qwen2" / "hf", foreign, compare_logits=False)
    assert "architecture: the checkpoint records none, not compared" in found.describe()


def test_every_field_of_an_architecture_is_compared(converted):
    ours = read_architecture(converted / "qwen3_moe" / "hf")
    recorded = json.loads(json.dumps(asdict(ours)))
    assert architecture_differences(ours, recorded) == []
    for kind, value in ((Architecture, ours), (Experts, ours.experts)):
        for field in fields(kind):
            if field.name in ("rope", "experts"):
                continue
            other = replace(value, **{field.name: "other"})
            changed = other if kind is Architecture else replace(ours, experts=other)
            (line,) = architecture_differences(changed, recorded)
            assert ": other and " in line
    assert "num_experts: none and 4" in architecture_differences(replace(ours, experts=None), recorded)
