"""`offgrpo plan`: facts for programs and readers, and the refusal of what does not fit."""

import json
import sys
from dataclasses import replace

import pytest

from megatron_offgrpo import cli
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.planning.assumed import AssumedGroups
from megatron_offgrpo.planning.hardware import Hardware
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.recipe import load_recipe
from megatron_offgrpo.reporting.plan_summary import Machine, fact_lines, plan_facts, plan_lines, require_fit


@pytest.fixture(scope="module")
def run():
    recipe = load_recipe("openthinker3_7b")
    return replace(recipe, plan=replace(recipe.plan, epochs=1))


@pytest.fixture(scope="module")
def plan(run):
    return build_plan(AssumedGroups(70, 8, 9000, 31744), run.plan, run.objective)


def test_facts_of_a_run(run, plan):
    machine = Machine.of(Hardware.parse("8xH100"), efficiency=0.5, price=2.0)
    facts = plan_facts(plan, run, machine)
    assert json.loads(json.dumps(facts)) == facts
    got = facts["plan"]
    # 70 groups are steps of 32, 32 and 6.
    assert (got["steps"], got["trajectories"], got["trajectories_of_last_step"]) == (3, 560, 48)
    # A zero-weight pack has `pack_multiple` tokens.
    empty = facts["balance"]["zero_weight_packs"]
    assert empty > 0
    assert got["fill"] == got["tokens"] / (got["padded_tokens"] + empty * run.plan.pack_multiple) > 0.99
    assert got["packs"] >= got["packs_lower_bound"]
    assert (facts["layout"]["dp"], facts["layout"]["gpus"]) == (2, 8)
    assert facts["flops"]["computed"] > facts["flops"]["model"]
    even = facts["balance"]
    # The last step has 48 trajectories of 9,200 tokens on average: fourteen packs or so, less than 8 a rank.
    assert even["steps_with_8_packs_a_rank"] == 2
    assert even["worst_imbalance_with_8_packs_a_rank"] <= 0.02
    time = facts["time"]
    assert time["gpu_hours"] == pytest.approx(8 * time["hours"])
    assert time["cost"] == pytest.approx(2 * time["gpu_hours"])
    assert time["hours"] == pytest.approx(3 * time["step_seconds"] / 3600)
    # At half the peak rate and with every layer computed again, MFU is below 3/4 of a half, and not far below.
    assert 0.5 * 0.7 < time["mfu"] < 0.5 * 0.77
    assert facts["memory"]["fits"] is True
    require_fit(facts)
    text = "\n".join(fact_lines(facts))
    for part in ("steps          3 (256, in the last step 48", "8 GPUs: dp=2 tp=4", "of 79.1 (H100)", "cost", "MFU"):
        assert part in text


def test_without_hardware_there_is_no_limit_and_no_time(run, plan):
    text = "\n".join(plan_lines(plan, run))
    assert "memory         about" in text
    assert "time" not in text
    assert "at an assumed 2 TFLOP/s" in "\n".join(plan_lines(plan, run, tflops_per_gpu=2.0))


def test_shared_prompts_stand_in_the_summary(run):
    # Prompts of 200 tokens, answers of 50 on average: 600 tokens a group instead of 2,000.
    shared = build_plan(AssumedGroups(70, 8, 50, 31744), run.plan, run.objective)
    facts = plan_facts(shared, run, Machine(8))
    saved = facts["plan"]["shared_prompt_tokens"]
    assert 0.8 * 70 * 7 * 200 < saved <= 70 * 7 * 200
    assert facts["plan"]["tokens"] + saved == int(shared.tokens.sum())
    assert facts["plan"]["packs"] >= facts["plan"]["packs_lower_bound"]
    text = "\n".join(fact_lines(facts))
    share = 100 * saved / int(shared.tokens.sum())
    assert f"prompts        shared: {saved:,} tokens fewer ({share:.1f} %)" in text
    never = replace(run.plan, share_prompts="never")
    separate = build_plan(AssumedGroups(70, 8, 50, 31744), never, run.objective)
    apart = plan_facts(separate, run, Machine(8))
    assert "prompts        not shared" in "\n".join(fact_lines(apart))
    assert facts["flops"]["computed"] < 0.5 * apart["flops"]["computed"]


def test_memory_knows_the_keys_that_responses_share(run):
    # A prompt of 200 with eight answers of one token, padded to 256: they see 201 keys each, the padding 48.
    plan = build_plan(AssumedGroups(1, 8, 1, 31744), replace(run.plan, share_prompts="always"), run.objective)
    assert plan.pack_tokens.tolist() == [208]
    assert plan.keys_per_token() == (8 * 201 + 48) / 256
    separate = build_plan(AssumedGroups(1, 8, 1, 31744), replace(run.plan, share_prompts="never"), run.objective)
    assert separate.keys_per_token() == 1


def test_what_does_not_fit_is_refused_with_a_layout_that_does(run):
    wide = replace(
        run, layout=replace(run.layout, tp=1, sequence_parallel=False), model=replace(run.model, recompute="none")
    )
    facts = plan_facts(None, wide, Machine.of(Hardware.parse("8xH100"), efficiency=0.5, price=None))
    assert "plan" not in facts
    with pytest.raises(ConfigError, match=r"layout: .*at most 71\.2 GiB.*remedy: --set layout\.tp=") as refusal:
        require_fit(facts)
    assert "8 GPUs" in str(refusal.value)
    large = load_recipe("llama3_70b_32x80gb")
    facts = plan_facts(None, large, Machine.of(Hardware.parse("16xA100-40GB"), efficiency=0.5, price=None))
    with pytest.raises(ConfigError, match=r"layout\.processes=64 .* on each of 64 GPUs") as refusal:
        require_fit(facts)
    assert json.loads(json.dumps(facts)) == facts
    assert [found["offload"] for found in facts["memory"]["proposals"]] == [True, False]
    here, more = str(refusal.value).split("; or ")
    assert "optimizer.cpu_offload=true --set checkpoint.format=reshardable" in here
    assert here.endswith("on each of 16 GPUs, and the optimizer in their hosts' memory)")
    assert "offload" not in more


def test_a_layout_the_model_cannot_take_is_refused(run):
    odd = replace(run, layout=replace(run.layout, tp=8))
    with pytest.raises(ConfigError, match=r"layout\.tp: does not divide the model's attention heads"):
        plan_facts(None, odd, Machine(8))


def test_the_command(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)

    def offgrpo(*arguments):
        monkeypatch.setattr(sys, "argv", ["offgrpo", "plan", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code or 0, *capfd.readouterr()

    status, out, err = offgrpo("qwen3_8b", "--hardware", "8xH100", "--json")
    assert status == 0
    assert json.loads(out)["memory"]["fits"] is True
    assert "no store at runs/qwen3_8b/store" in err
    status, out, _ = offgrpo("qwen3_8b", "--hardware", "8xH100", "--assume", "40x500", "--json", "--price", "2")
    assert status == 0
    assert json.loads(out)["plan"]["groups_per_epoch"] == 40
    assert json.loads(out)["time"]["cost"] > 0
    assert list(tmp_path.iterdir()) == []
    for price in ("nan", "inf", "-1"):
        status, _, err = offgrpo("qwen3_8b", "--hardware", "8xH100", "--price", price)
        assert (status, err.count("error: --price: not a price")) == (1, 1)
    status, _, err = offgrpo("qwen3_8b")
    assert status == 1
    assert "offgrpo prepare" in err
    status, out, err = offgrpo("llama3_70b", "--hardware", "16xL40S")
    assert status == 1
    assert "memory         about" in out
    assert "error: layout: the run does not fit" in err
