"""Layouts that divide and fit; hardware by name; groups that are only assumed."""

import re
from dataclasses import replace

import numpy as np
import pytest

from megatron_offgrpo.config import LayoutConfig, RunConfig, with_values
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.model.gpt import transformer_config
from megatron_offgrpo.model.published import find_architecture
from megatron_offgrpo.model.shape import shape_of
from megatron_offgrpo.parallel import portable
from megatron_offgrpo.planning.assumed import AssumedGroups
from megatron_offgrpo.planning.divides import check_divides
from megatron_offgrpo.planning.hardware import Hardware
from megatron_offgrpo.planning.layouts import Proposal, proposals, propose
from megatron_offgrpo.planning.memory import GIB
from megatron_offgrpo.planning.shape import padded_vocab_size
from megatron_offgrpo.recipe import apply_override, load_recipe

QWEN3_30B = shape_of(find_architecture("Qwen3-30B-A3B")[0])
OPENTHINKER3 = shape_of(find_architecture("OpenThinker3-7B")[0])


def test_the_vocabulary_is_padded_as_the_model_pads_it():
    assert OPENTHINKER3.embedding_rows(tp=8) * 8 == padded_vocab_size(OPENTHINKER3.vocab_size, 8) == 152_576


@pytest.mark.parametrize(
    ("name", "layout", "field"),
    [
        # 28 heads, 4 of keys and values, 28 layers.
        ("OpenThinker3-7B", {"tp": 4}, None),
        ("OpenThinker3-7B", {"tp": 8}, "layout.tp"),
        ("OpenThinker3-7B", {"pp": 2, "vpp": 7}, None),
        ("OpenThinker3-7B", {"pp": 2, "vpp": 3}, "layout.pp"),
        ("OpenThinker3-7B", {"ep": 2}, "layout.ep"),
        # 32 heads, 4 of keys and values, 48 layers, 128 experts of width 768.
        ("Qwen3-30B-A3B", {"tp": 8}, "layout.tp"),
        ("Qwen3-30B-A3B", {"pp": 3, "ep": 16}, None),
        ("Qwen3-30B-A3B", {"ep": 3}, "layout.ep"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(name, layout, field):
    portable.install()
    architecture, model = find_architecture(name)[0], load_recipe("openthinker3_7b").model
    if field is None:
        assert transformer_config(architecture, LayoutConfig(**layout), model).num_layers == architecture.num_layers
        return
    with pytest.raises(ConfigError, match=rf"{re.escape(field)}: does not divide"):
        transformer_config(architecture, LayoutConfig(**layout), model)


@pytest.mark.parametrize(
    ("shape", "layout", "is_refused"),
    [
        (replace(OPENTHINKER3, ffn_hidden_size=18943), {"tp": 1}, False),
        (replace(OPENTHINKER3, ffn_hidden_size=18943), {"tp": 2}, True),
        # With expert parallelism an expert is never split.
        (replace(QWEN3_30B, ffn_hidden_size=767), {"tp": 2}, True),
        (replace(QWEN3_30B, ffn_hidden_size=767), {"tp": 2, "ep": 2, "sequence_parallel": True}, False),
    ],
)
def test_tensor_parallelism_splits_the_feed_forward_width(shape, layout, is_refused):
    model = load_recipe("openthinker3_7b").model
    if is_refused:
        with pytest.raises(ConfigError, match="feed-forward width"):
            check_divides(shape, LayoutConfig(**layout), model)
    else:
        check_divides(shape, LayoutConfig(**layout), model)


def test_experts_under_tensor_parallelism_want_sequence_parallelism():
    model = load_recipe("openthinker3_7b").model
    with pytest.raises(ConfigError, match=r"layout\.sequence_parallel: .*--set layout\.sequence_parallel=true"):
        check_divides(QWEN3_30B, LayoutConfig(tp=2), model)
    check_divides(QWEN3_30B, LayoutConfig(tp=2, sequence_parallel=True), model)


@pytest.mark.parametrize("num_gpus", [8, 64])
def test_a_proposal_divides_fits_and_can_be_set(num_gpus):
    run, hardware = load_recipe("openthinker3_7b"), Hardware.parse(f"{num_gpus}xA100-40GB")
    (found,) = proposals(OPENTHINKER3, run, hardware, pack_costs=np.ones(90))
    assert found.memory.total <= hardware.usable_bytes
    run = with_settings(run, found)
    assert (run.layout, run.model.recompute) == (found.layout, found.recompute)
    assert (found.offload, run.optimizer.cpu_offload) == (False, False)
    run.check_layout(num_gpus)
    check_divides(OPENTHINKER3, run.layout, run.model)


def with_settings(run: RunConfig, found: Proposal) -> RunConfig:
    for setting in found.settings().removeprefix("--set ").split(" --set "):
        run = apply_override(run, setting)
    return run


def test_what_does_not_fit_is_proposed_with_the_optimizer_on_the_hosts_and_on_more_gpus():
    run, hardware = load_recipe("llama3_70b"), Hardware.parse("8x80GB")
    shape = shape_of(find_architecture(run.paths.hf_model)[0])
    # 18 bytes for each of 70.6e9 parameters over 8 GPUs are 148 GiB each, and 6 bytes 49.
    assert propose(shape, run, hardware, pack_costs=np.ones(90)) is None
    here, more = proposals(shape, run, hardware, pack_costs=np.ones(90))
    assert (here.num_gpus, here.offload, here.memory.optimizer) == (8, True, 0)
    assert here.memory.total <= hardware.usable_bytes
    offloads = with_settings(run, here)
    assert (offloads.optimizer.cpu_offload, offloads.checkpoint.format) == (True, "reshardable")
    assert (more.num_gpus, more.offload) == (32, False)
    assert more.memory.total <= hardware.usable_bytes
    # 40 GiB do not hold the 49.
    (only_more,) = proposals(shape, run, Hardware.parse("8xA100-40GB"), pack_costs=np.ones(90))
    assert not only_more.offload
    # Offload needs bf16: of 16 bytes a parameter in fp32 it would take 8, and 33 GiB would be left on each of 16 GPUs.
    precise = replace(run, model=replace(run.model, precision="fp32"))
    (only_more,) = proposals(shape, precise, Hardware.parse("16x80GB"), pack_costs=np.ones(90))
    assert not only_more.offload


def test_a_proposal_takes_only_what_fp8_multiplies():
    # A width that 16 divides and 32 does not.
    shape, run = replace(OPENTHINKER3, ffn_hidden_size=18960), load_recipe("openthinker3_7b_64x80gb")
    in_fp8 = with_values(run, model={"precision": "fp8", "layer": "transformer_engine"}, plan={"pack_multiple": 512})
    hardware = Hardware.parse("16xA100-40GB")
    found = [propose(shape, of, hardware, pack_costs=np.ones(640)) for of in (run, in_fp8)]
    assert [proposal.layout.tp for proposal in found] == [4, 1]


def test_a_proposal_has_room_for_the_keys_of_shared_prompts():
    run, hardware = load_recipe("openthinker3_7b_64x80gb"), Hardware.parse("64xH200")
    few, many = (
        propose(OPENTHINKER3, run, hardware, pack_costs=np.ones(90), keys_per_token=keys) for keys in (1.0, 4.0)
    )
    assert few.layout == many.layout
    assert few.memory.total < many.memory.total <= hardware.usable_bytes


def test_fewer_packs_than_data_parallel_ranks_cost_time():
    assert ranks_for(np.ones(1024)) == 64
    assert ranks_for(np.ones(4)) == 4


def ranks_for(pack_costs) -> int:
    """Data-parallel ranks of the proposal for a 7B model with short packs on 64 large GPUs."""
    run, hardware = load_recipe("openthinker3_7b"), Hardware.parse("64xH200")
    small = replace(run, plan=replace(run.plan, max_pack_tokens=8192))
    return propose(OPENTHINKER3, small, hardware, pack_costs=pack_costs).layout.data_parallel_size(64)


def test_packs_of_unlike_cost_get_no_more_ranks_than_share_them_evenly():
    # 64 equal packs keep 64 ranks busy. One that costs as much as 16 of them lets three quarters of 64 ranks wait,
    # and is the share of one of five.
    assert ranks_for(np.ones(64)) == 64
    assert ranks_for(np.array([16.0, *np.ones(64)])) <= 5


def test_hardware_by_name():
    got = Hardware.parse("32xH100")
    assert (got.num_gpus, got.card, got.peak_tflops) == (32, "H100", 989.4)
    assert got.usable_bytes == pytest.approx(0.9 * 79.1 * GIB)
    assert Hardware.parse("8x80GB").peak_tflops is None
    for text in ("H100", "0xH100", "8xV100", "8 x H100", "8x"):
        with pytest.raises(ConfigError, match="--hardware"):
            Hardware.parse(text)


def test_assumed_groups():
    groups = AssumedGroups.parse("500x1000", size=8, max_tokens=31744)
    assert (groups.num_groups, groups.num_trajectories) == (500, 4000)
    # Every quantile stands four times, so nothing is left to chance; 1,000 quantiles cut off the far end of the mean.
    assert groups.response_lengths.mean() == pytest.approx(1000, rel=0.01)
    assert np.log(groups.response_lengths).std() == pytest.approx(0.8, rel=0.01)
    assert AssumedGroups.parse("500x1000", size=8, max_tokens=900).response_lengths.max() == 900
    for text in ("500", "500x", "0x10", "1x" + 20 * "9", "99999999x5"):
        with pytest.raises(ConfigError, match="--assume"):
            AssumedGroups.parse(text, size=8, max_tokens=1)
