"""The order of the commands, and what each waits for."""

import inspect
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.launch.chain import ChainOptions, chain_of, from_json, to_json
from megatron_offgrpo.launch.settings import LaunchSettings, expanded, local_script, signal_lead
from recipes import objectives
from recipes.quickstart import quickstart


def steps_of(run=None, **options):
    return chain_of("quickstart", ["plan.epochs=3"], run or quickstart(), ChainOptions(**options))


def needs(steps):
    return {step.name: step.needs for step in steps}


def test_the_whole_chain():
    steps = steps_of(inputs=("a.jsonl",), benchmark="b.jsonl", prepare_shards=4, eval_shards=2)
    assert needs(steps) == {
        "prepare_shards": (),
        "prepare": ("prepare_shards",),
        "convert": (),
        "plan": ("prepare",),
        "reference": ("convert", "plan"),
        "train": ("reference",),
        "export": ("train",),
        "eval_base_shards": ("plan",),
        "eval_base": ("eval_base_shards",),
        "eval_final_shards": ("export",),
        "eval_final": ("eval_final_shards",),
        "report": ("export", "eval_base", "eval_final"),
    }
    by_name = {step.name: step for step in steps}
    assert by_name["prepare"].arguments == by_name["prepare_shards"].arguments
    assert by_name["train"].arguments == ("train", "quickstart", "--set", "plan.epochs=3")
    assert [step.name for step in steps if step.on_ranks] == ["reference", "train"]
    order = [step.name for step in steps]
    assert all(order.index(need) < order.index(step.name) for step in steps for need in step.needs)


def test_what_is_not_asked_for_is_left_out():
    run = quickstart()
    free = replace(run, objective=replace(run.objective, beta=0.0))
    assert needs(steps_of(free)) == {
        "convert": (),
        "plan": (),
        "train": ("convert", "plan"),
        "export": ("train",),
        "report": ("export",),
    }
    assert needs(steps_of(steps=("export", "train"))) == {"train": (), "export": ("train",)}
    # The reference pass and the export are left out; what they wait for is not.
    assert needs(steps_of(steps=("plan", "train", "report"))) == {"plan": (), "train": ("plan",), "report": ("train",)}


def test_mistakes():
    with pytest.raises(ConfigError, match=r"--steps: no such step.*got trian"):
        steps_of(steps=("trian",))
    run = quickstart()
    with pytest.raises(ConfigError, match=r"paths\.megatron: this path is empty"):
        steps_of(replace(run, paths=replace(run.paths, megatron="")))
    without = replace(run, paths=replace(run.paths, reference=""))
    with pytest.raises(ConfigError, match=r"paths\.reference: this path is empty"):
        steps_of(without)
    assert "reference" not in needs(steps_of(replace(without, objective=objectives.sft())))
    with pytest.raises(ConfigError, match=r"--gpus-per-node: torchrun needs a number"):
        LaunchSettings("torchrun", "/h", "/w", "python")
    with pytest.raises(ConfigError, match=r"--nodes: one machine only"):
        LaunchSettings("local", "/h", "/w", "python", nodes=2)
    with pytest.raises(ConfigError, match=r"--ssh"):
        LaunchSettings("slurm", "/h", "/w", "python", ssh="user@host")


def test_the_address_of_a_login_node():
    def node(address: str) -> tuple[str, str, int | None]:
        return LaunchSettings("slurm", "/h", "/w", "python", ssh=address, job_dir="/j").login_node()

    assert node("ann@login.site") == ("ann", "login.site", None)
    assert node("ann@login:2222") == ("ann", "login", 2222)
    for wrong in ("login", "ann@login:", "ann@login:ssh", "ann@"):
        with pytest.raises(ConfigError, match="--ssh"):
            node(wrong)


def test_the_launcher_reads_what_the_project_wrote():
    steps = steps_of(inputs=("a b.jsonl",), prepare_shards=2)
    assert from_json(to_json(steps)) == steps


def test_shards_become_tasks():
    tasks = {
        name: (arguments[-2:], before)
        for _, name, arguments, before in expanded(steps_of(inputs=("a",), prepare_shards=2))
    }
    assert tasks["prepare_shards_1"] == (("--shard", "1/2"), ())
    assert tasks["prepare"][1] == ("prepare_shards_0", "prepare_shards_1")


def test_the_script_of_a_local_task():
    settings = LaunchSettings("torchrun", "/h", "/w", "python", gpus_per_node=2, environment={"NOTE": "two words"})
    train = steps_of(steps=("train",))[0]
    assert local_script(settings, train, "train", train.arguments, ("plan",), "/w/logs/x") == (
        "mkdir -p /w/logs/x\n"
        "cd /w || exit 1\n"
        "export NOTE='two words'\n"
        "export OFFGRPO_OUTCOME=/w/logs/x/train.outcome\n"
        '[[ -e /w/logs/x/plan.done ]] || { echo "not started: plan did not succeed"; exit 1; }\n'
        "set -o pipefail\n"
        "python -m torch.distributed.run --standalone --nproc-per-node=2 -m megatron_offgrpo.cli train quickstart "
        "--set plan.epochs=3 2>&1 | tee /w/logs/x/train.log && touch /w/logs/x/train.done\n"
    )


def test_the_launcher_needs_no_torch():
    code = "import sys, megatron_offgrpo.launch.command, megatron_offgrpo.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("time", "lead"),
    # A quarter of 10 min, of 2 min 20 s, of 30 min; more than 40 min: ten minutes.
    [
        ("10", 150),
        ("2:20", 35),
        ("00:30:00", 450),
        ("24:00:00", 600),
        ("1-0", 600),
        ("0-00:04", 60),
        ("1-02:03:04", 600),
    ],
)
def test_the_signal_comes_well_after_the_start(time, lead):
    assert signal_lead(time) == lead


@pytest.mark.parametrize("time", ["", "ten", "1:2:3:4", "-5", "1-2:3:4:5"])
def test_what_is_no_time_limit(time):
    with pytest.raises(ConfigError, match="not a time limit"):
        signal_lead(time)


OBJECTIVES = {
    name: make
    for name, make in inspect.getmembers(objectives, inspect.isfunction)
    if make.__module__ == objectives.__name__ and not name.startswith("_")
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_reference_pass_is_there_for_every_objective_that_reads_it(name):
    objective = OBJECTIVES[name]()
    # What the function itself asks for, or a KL term: worked out here without the project's rule.
    surrogate = getattr(objective.surrogate, "func", objective.surrogate)
    reads = objective.beta > 0 or "ref" in inspect.signature(surrogate).parameters
    assert reads == (name in ("released", "blog", "asft", "dpo", "kto"))
    steps = needs(steps_of(replace(quickstart(), objective=objective)))
    assert ("reference" in steps) == reads
    assert steps["train"] == (("reference",) if reads else ("convert", "plan"))
