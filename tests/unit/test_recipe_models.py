"""The recipes for published models: parameters, division over the layout, memory of the named hardware."""

import json
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_offgrpo.model.gpt import transformer_config
from megatron_offgrpo.model.published import PUBLISHED, find_architecture
from megatron_offgrpo.model.shape import shape_of
from megatron_offgrpo.parallel import portable
from megatron_offgrpo.planning.divides import check_divides
from megatron_offgrpo.planning.hardware import Hardware
from megatron_offgrpo.planning.memory import memory_per_rank, parameters_of_stage
from megatron_offgrpo.recipe import load_recipe
from tests.distributed.harness import run_ranks
from tools.plan_table import published_recipes

# Numbers of parameters on the models' cards and index files.
PARAMETERS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-14B": 14_770_033_664,
    "OpenThinker2-7B": 7_615_616_512,
    "OpenThinker3-7B": 7_615_616_512,
    "AceReason-Nemotron-1.1-7B": 7_615_616_512,
    "Qwen3-8B": 8_190_735_360,
    "DeepSeek-R1-Distill-Qwen-32B": 32_763_876_352,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "Llama-3.3-70B-Instruct": 70_553_706_496,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
}
HARDWARE = {"r1_distill_qwen_32b": "32x80GB", "llama3_70b": "64x80GB"}
"""Of recipes whose name does not end in it, where it is not 8x80GB."""
RECIPES = published_recipes()
SEVEN_BILLION = ("openthinker3_7b", "openthinker2_7b", "acereason_nemotron_1_1_7b")
WANTED = {
    *(name + settings for name in SEVEN_BILLION for settings in ("", "_blog")),
    *("qwen3_8b", "r1_distill_qwen_32b", "llama3_70b", "qwen3_30b_a3b"),
}


def hardware_of(name: str) -> Hardware:
    found = re.search(r"_(\d+x\d+)gb$", name)
    return Hardware.parse(f"{found[1]}GB" if found else HARDWARE.get(name, "8x80GB"))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameters_are_those_of_transformers_and_of_the_card(name):
    raw = {key: value for key, value in PUBLISHED[name].items() if key != "model_type"}
    config = AutoConfig.for_model(PUBLISHED[name]["model_type"], **raw)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    architecture = find_architecture(name)[0]
    assert shape_of(architecture).num_parameters == count == PARAMETERS[name] == architecture.num_parameters()


def test_every_wanted_model_has_a_recipe_for_one_four_and_eight_nodes():
    for wanted in WANTED:
        sizes = {hardware_of(name).num_gpus for name in RECIPES if re.fullmatch(rf"{wanted}(_\d+x80gb)?", name)}
        assert sizes == {8, 32, 64}, wanted


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_the_model_and_the_hardware_it_names(name):
    portable.install()
    run = load_recipe(name)
    assert run.name == name
    hardware = hardware_of(name)
    assert run.layout.processes == hardware.num_gpus
    run.check_layout(hardware.num_gpus)
    architecture = find_architecture(run.paths.hf_model)[0]
    check_divides(shape_of(architecture), run.layout, run.model)
    config = transformer_config(architecture, run.layout, run.model)
    assert config.num_layers % (config.pipeline_model_parallel_size * run.layout.vpp) == 0
    memory = memory_per_rank(
        shape_of(architecture),
        run.layout,
        run.model,
        num_gpus=hardware.num_gpus,
        max_pack_tokens=run.plan.max_pack_tokens,
        offload=run.optimizer.cpu_offload,
    )
    assert memory.total <= hardware.usable_bytes
    # What the optimizer needs, which is refused only when training starts.
    assert not run.optimizer.cpu_offload or (run.model.precision, run.checkpoint.format) == ("bf16", "reshardable")
    # The longest trajectory of the released data fits into a pack.
    assert run.plan.max_pack_tokens >= 1024 + run.objective.max_response_tokens


def test_the_first_and_the_last_stage_of_every_recipe_have_the_parameters_that_the_plan_counts(tmp_path):
    output = tmp_path / "parameters.json"
    run_ranks("tests.unit.built_stages:write_built_parameters", 1, output=str(output), recipes=RECIPES)
    built = json.loads(output.read_text())
    for name in RECIPES:
        run = load_recipe(name)
        shape = shape_of(find_architecture(run.paths.hf_model)[0])
        counted = {str(stage): sum(parameters_of_stage(shape, run.layout, stage)) for stage in {0, run.layout.pp - 1}}
        assert built[name] == counted, name


def test_variants_differ_in_what_they_say():
    released, blog = load_recipe("acereason_nemotron_1_1_7b"), load_recipe("acereason_nemotron_1_1_7b_blog")
    assert (released.plan.epochs, blog.plan.epochs) == (5, 3)
    assert (released.objective.beta, blog.objective.beta) == (0.2, 0.1)
    assert released.paths == blog.paths
    assert released.paths.hf_model == "models/AceReason-Nemotron-1.1-7B"
    assert load_recipe("openthinker3_7b_64x80gb").model.recompute == "none"
    one_node, four_nodes = load_recipe("llama3_70b_8x80gb"), load_recipe("llama3_70b_32x80gb")
    assert (one_node.optimizer.cpu_offload, four_nodes.optimizer.cpu_offload) == (True, False)
    assert one_node.paths == four_nodes.paths
