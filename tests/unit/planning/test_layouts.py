"""Layouts that divide and fit; hardware by name; groups that are only assumed."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_offgrpo.config import LayoutConfig
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.model.gpt import PADDED_VOCAB_MULTIPLE, transformer_config
from megatron_offgrpo.model.published import PUBLISHED, find_architecture
from megatron_offgrpo.model.shape import shape_of
from megatron_offgrpo.parallel import portable
from megatron_offgrpo.planning.assumed import AssumedGroups
from megatron_offgrpo.planning.hardware import Hardware
from megatron_offgrpo.planning.layouts import check_divides, propose, propose_more
from megatron_offgrpo.planning.memory import GIB
from megatron_offgrpo.planning.shape import VOCAB_MULTIPLE
from megatron_offgrpo.recipe import apply_override, load_recipe

QWEN3_30B = shape_of(find_architecture("Qwen3-30B-A3B")[0])
OPENTHINKER3 = shape_of(find_architecture("OpenThinker3-7B")[0])


def test_the_vocabulary_is_padded_as_the_model_pads_it():
    assert VOCAB_MULTIPLE == PADDED_VOCAB_MULTIPLE
    assert OPENTHINKER3.embedding_rows(tp=8) * 8 == 152_576


LAYOUTS = [
    *(LayoutConfig(tp=n) for n in (2, 4, 8)),
    *(LayoutConfig(pp=3), LayoutConfig(pp=2, vpp=3), LayoutConfig(ep=16), LayoutConfig(ep=3)),
]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_refusals_are_those_of_the_model(name):
    portable.install()
    architecture, model = find_architecture(name)[0], load_recipe("openthinker3_7b").model
    by_plan = [_refuses(check_divides, shape_of(architecture), layout) for layout in LAYOUTS]
    assert by_plan == [_refuses(transformer_config, architecture, layout, model) for layout in LAYOUTS]
    assert True in by_plan
    assert False in by_plan


def _refuses(function, *arguments) -> bool:
    try:
        function(*arguments)
    except ConfigError:
        return True
    return False


@pytest.mark.parametrize("num_gpus", [8, 64])
def test_a_proposal_divides_fits_and_can_be_set(num_gpus):
    run, hardware = load_recipe("openthinker3_7b"), Hardware.parse(f"{num_gpus}xA100-40GB")
    found = propose(OPENTHINKER3, run, hardware, packs_per_step=90)
    assert found.memory.total <= hardware.usable_bytes
    for setting in found.settings().split(" --set "):
        run = apply_override(run, setting.removeprefix("--set "))
    assert (run.layout, run.model.recompute) == (found.layout, found.recompute)
    run.check_layout(num_gpus)
    check_divides(OPENTHINKER3, run.layout)


def test_what_fits_nowhere_is_proposed_on_more_gpus():
    run, hardware = load_recipe("llama3_70b"), Hardware.parse("8x80GB")
    shape = shape_of(find_architecture(run.paths.hf_model)[0])
    # 18 bytes for each of 70.6e9 parameters over 8 GPUs are 148 GiB each.
    assert propose(shape, run, hardware, packs_per_step=90) is None
    found = propose_more(shape, run, hardware, packs_per_step=90)
    assert found.num_gpus == 32
    assert found.memory.total <= hardware.usable_bytes


def test_fewer_packs_than_data_parallel_ranks_cost_time():
    # 96 packs on 32 ranks are three each; 33 would leave half of the ranks idle in the second round.
    run, hardware = load_recipe("openthinker3_7b"), Hardware.parse("64xH200")
    small = replace(run, plan=replace(run.plan, max_pack_tokens=8192))
    many = propose(OPENTHINKER3, small, hardware, packs_per_step=1024).layout
    few = propose(OPENTHINKER3, small, hardware, packs_per_step=4).layout
    assert many.data_parallel_size(64) == 64
    assert few.data_parallel_size(64) <= 4


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
    for text in ("500", "500x", "0x10"):
        with pytest.raises(ConfigError, match="--assume"):
            AssumedGroups.parse(text, size=8, max_tokens=1)
