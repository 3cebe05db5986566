"""Which layers and precisions are refused, and where."""

from dataclasses import replace

import pytest
import torch

from megatron_offgrpo.config import LayoutConfig, ModelConfig
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.model import layers
from megatron_offgrpo.model.gpt import build_model, transformer_config
from megatron_offgrpo.training import loop
from tests.distributed.toy import architecture, toy_run

FP8 = ModelConfig(precision="fp8", layer="transformer_engine")


@pytest.mark.parametrize(
    ("precision", "layer", "capability", "version", "message"),
    [
        (
            "fp8",
            "portable",
            (9, 0),
            "2.12.0",
            r"model\.precision: only .* expected bf16 or fp32 .*remedy: --set model\.la",
        ),
        ("bf16", "transformer_engine", None, "2.12.0", r"model\.layer: Transformer Engine needs a GPU; .*=portable"),
        ("bf16", "transformer_engine", (9, 0), None, r"model\.layer: there is no .* got none .*make install"),
        (
            "bf16",
            "transformer_engine",
            (9, 0),
            "2.11.0",
            r"model\.layer: .* expected transformer-engine 2\.12 .* got 2\.11\.0",
        ),
        (
            "fp8",
            "transformer_engine",
            (8, 0),
            "2.12.0",
            r"model\.precision: .* expected compute .* 8\.9 .* got 8\.0; rem",
        ),
        ("bf16", "transformer_engine", (8, 0), "2.12.0", None),
        ("fp8", "transformer_engine", (9, 0), "2.12.0", None),
    ],
)
def test_a_layer_that_cannot_run_is_refused_before_it_is_built(
    precision, layer, capability, version, message, monkeypatch
):
    from packaging.version import Version

    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(layers, "HAVE_TE", version is not None)
    monkeypatch.setattr(layers, "get_te_version", lambda: version and Version(version))
    monkeypatch.setattr(layers, "is_te_min_version", lambda least: Version(version) >= Version(least))
    model = ModelConfig(precision=precision, layer=layer)
    if message is None:
        layers.require_layer(model)
        return
    with pytest.raises(ConfigError, match=message):
        build_model(architecture("qwen2"), LayoutConfig(), model)


def test_training_refuses_before_it_opens_anything():
    run = replace(toy_run(), model=ModelConfig(precision="fp8"))
    with pytest.raises(ConfigError, match="only Transformer Engine's layer"):
        loop.train(run, place=None)


@pytest.mark.parametrize(
    ("changes", "layout", "name"),
    [
        ({"hidden_size": 40}, {}, "the hidden size"),
        ({}, {"tp": 2}, "the feed-forward width / tp"),
        ({"ffn_hidden_size": 64, "head_dim": 4}, {"tp": 2}, "queries / tp"),
        ({"ffn_hidden_size": 64, "head_dim": 4}, {}, None),
        ({"ffn_hidden_size": 64, "num_kv_heads": 1, "head_dim": 4}, {}, "queries, keys and values / tp"),
        ({"ffn_hidden_size": 64}, {"tp": 2}, None),
    ],
)
def test_matrices_that_fp8_cannot_multiply(changes, layout, name):
    # Hidden size 32, feed-forward 48, four heads and two of keys and values with 8 each.
    shape = replace(architecture("qwen2"), **changes)
    if name is None:
        assert transformer_config(shape, LayoutConfig(**layout), FP8).fp8 == "hybrid"
        return
    with pytest.raises(
        ConfigError, match=rf"model\.precision: {name} cannot .* expected a multiple of 16; got \d+; rem"
    ):
        transformer_config(shape, LayoutConfig(**layout), FP8)


def test_experts_that_fp8_cannot_multiply(monkeypatch):
    # Megatron asks for the version of Transformer Engine.
    monkeypatch.setattr("megatron.core.transformer.transformer_config.is_te_min_version", lambda least: True)
    shape = architecture("qwen3_moe")
    with pytest.raises(ConfigError, match=r"the feed-forward width / tp .* got 24"):
        transformer_config(shape, LayoutConfig(), FP8)
    wide = replace(shape, experts=replace(shape.experts, ffn_hidden_size=16))
    with pytest.raises(ConfigError, match=r"the feed-forward width / tp .* got 8"):
        transformer_config(wide, LayoutConfig(tp=2, sequence_parallel=True), FP8)
    # With expert parallelism an expert is never split.
    assert transformer_config(wide, LayoutConfig(tp=2, sequence_parallel=True, ep=2), FP8).fp8_recipe == "tensorwise"


@pytest.mark.parametrize(
    ("layout", "multiple", "processes"),
    [
        ({}, 16, 1),
        ({"tp": 2}, 16, 2),
        ({"tp": 2, "sequence_parallel": True}, 32, 2),
        ({"cp": 2}, 32, 2),
        ({"tp": 2, "sequence_parallel": True, "cp": 2}, 64, 4),
    ],
)
def test_a_rank_needs_a_multiple_of_sixteen_tokens_for_fp8(layout, multiple, processes):
    run = replace(toy_run(LayoutConfig(**layout), pack_multiple=multiple), model=FP8)
    run.check_layout(processes)
    half = replace(run, plan=replace(run.plan, pack_multiple=multiple // 2))
    with pytest.raises(
        ConfigError, match=rf"plan\.pack_multiple: fp8 .* = {multiple}; got {multiple // 2}; remedy: --set"
    ):
        half.check_layout(processes)
    replace(half, model=ModelConfig(layer="transformer_engine")).check_layout(processes)


def test_weights_are_in_bf16_under_fp8():
    kept = {precision: ModelConfig(precision=precision).weight_precision for precision in ("fp32", "bf16", "fp8")}
    assert kept == {"fp32": "fp32", "bf16": "bf16", "fp8": "bf16"}
    config = transformer_config(architecture("qwen2"), LayoutConfig(), FP8)
    assert (config.params_dtype, config.bf16) == (torch.bfloat16, True)
