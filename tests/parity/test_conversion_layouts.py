"""Checkpoints that training wrote in any layout come back exactly: weights, master weights, no padding rows."""

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file

from checkpoints_conversion import hf_to_megatron, megatron_to_hf
from checkpoints_conversion.megatron_reader import MegatronWeights, iteration_folder
from tests.distributed.harness import run_ranks
from tests.unit.conversion.tiny_models import VOCAB, save_tiny_model

STEP = 2.0**-12
"""What the worker adds to every master weight: far less than half a bf16 step of a weight near 0.15."""

# model, layout, precision, non_homogeneous: other ways Megatron can lay out its keys.
ONE = [("qwen2_tied", {}, "bf16", "stacked"), ("qwen3_moe", {}, "bf16", "singleton"), ("qwen2", {}, "fp32", "stacked")]
TWO = [
    ("qwen2_tied", {"tp": 2}, "bf16", "stacked"),
    ("qwen2_tied", {"pp": 2}, "bf16", "stacked"),
    ("llama_linear_rope", {"tp": 2}, "fp32", "per_layer"),
    ("qwen3_moe", {"ep": 2}, "bf16", "stacked"),
    ("mixtral", {"pp": 2}, "bf16", "singleton"),
    ("qwen3", {}, "bf16", "stacked"),
]
MODELS = sorted({case[0] for case in ONE + TWO})


def name_of(case: tuple) -> str:
    model, layout, precision, keys = case
    return "-".join([model, *(f"{k}{v}" for k, v in layout.items()), precision, keys])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """folder/MODEL/hf, folder/MODEL/megatron, and folder/CASE, a checkpoint written in the case's layout."""
    folder = tmp_path_factory.mktemp("trained")
    for model in MODELS:
        save_tiny_model(model, folder / model / "hf", dtype=torch.bfloat16)
        hf_to_megatron(folder / model / "hf", folder / model / "megatron")
    for world_size, cases in ((1, ONE), (2, TWO)):
        arguments = [
            {
                "model": str(folder / model),
                "output": str(folder / name_of((model, layout, precision, keys))),
                "layout": layout,
                "precision": precision,
                "keys": keys,
            }
            for model, layout, precision, keys in cases
        ]
        run_ranks(
            "tests.parity.conversion_layouts_worker:write_checkpoints",
            world_size,
            timeout_seconds=560,
            cases=arguments,
            step=STEP,
        )
    return folder


@pytest.mark.parametrize("case", ONE + TWO, ids=name_of)
def test_weights_and_master_weights_come_back_exactly(case, trained, tmp_path):
    model, _, precision, keys = case
    hf, checkpoint = trained / model / "hf", trained / name_of(case)
    original = load_file(hf / "model.safetensors")
    manifest = megatron_to_hf(checkpoint, hf, tmp_path / "own")
    ours = load_file(tmp_path / "own" / "model.safetensors")
    masters = megatron_to_hf(checkpoint, hf, tmp_path / "fp32", dtype="fp32")
    fp32 = load_file(tmp_path / "fp32" / "model.safetensors")
    assert ours.keys() == fp32.keys() == original.keys()
    assert manifest.config["iteration"] == "iter_0000010"
    for name, tensor in original.items():
        assert ours[name].dtype == getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[precision])
        assert torch.equal(ours[name].float(), tensor.float()), name
        # The worker moved the master weights of bf16 models alone.
        moved = tensor.float() + STEP if precision == "bf16" and keys == "stacked" else tensor.float()
        assert torch.equal(fp32[name], moved), name
    assert masters.config["master_weights"] == (keys == "stacked"), "the other cases were saved without optimizer"


def test_the_checkpoints_do_hold_padding_rows_and_the_keys_they_are_named_for(trained):
    padded = MegatronWeights(iteration_folder(trained / "qwen2_tied-tp2-bf16-stacked"))
    entry = padded.tensors["embedding.word_embeddings.weight"]
    assert tuple(entry.size) == (256, 48), "101 rows, padded to a multiple of 128 * tp"
    assert len(entry.chunks) == 2
    assert VOCAB < 128, "the second chunk is padding alone"
    per_layer = MegatronWeights(iteration_folder(trained / "llama_linear_rope-tp2-fp32-per_layer"))
    assert "decoder.layers.3.mlp.linear_fc1.weight" in per_layer.tensors
    # Megatron-LM and Megatron-Bridge take the model's shape from here.
    arguments = dist_checkpointing.load_common_state_dict(str(padded.folder))["args"]
    assert (arguments.num_layers, arguments.hidden_size, arguments.params_dtype) == (4, 48, torch.bfloat16)
    singleton = MegatronWeights(iteration_folder(trained / "mixtral-pp2-bf16-singleton"))
    assert "decoder.layers.2.mlp.experts.experts.3.linear_fc1.weight_v" in singleton.tensors
