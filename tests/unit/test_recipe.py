"""Recipes by name, and strict overrides."""

import importlib
import sys
from functools import partial

import pytest

from megatron_offgrpo.config import RunConfig
from megatron_offgrpo.config_values import describe_callable, to_dict
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.objective import advantages, surrogates
from megatron_offgrpo.recipe import apply_override, list_recipes, load_data_recipe, load_recipe


def test_a_recipe_by_name_and_by_module():
    assert load_recipe("quickstart").name == "quickstart"
    assert to_dict(load_recipe("recipes.quickstart:quickstart")) == to_dict(load_recipe("quickstart"))


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_every_recipe_builds_and_has_a_json_form(name):
    config = load_recipe(name)
    assert isinstance(config, RunConfig)
    assert config.name == name
    assert to_dict(config)["objective"]["surrogate"]["call"].startswith("megatron_offgrpo.objective.surrogates:")


def test_released_settings():
    run = load_recipe("openthinker3_7b")
    objective = run.objective
    assert objective.advantage is advantages.mean_only
    assert objective.surrogate is surrogates.linear
    assert (objective.all_positive, objective.all_positive_bias) == ("set", 0.1)
    assert (objective.beta, objective.entropy_coefficient, objective.weight) == (0.2, 0.001, "constant")
    assert objective.max_response_tokens == 31744
    assert describe_callable(objective.kl) == {
        "call": "megatron_offgrpo.objective.divergences:k3",
        "args": {"clamp": 10.0},
    }
    assert (run.plan.epochs, run.plan.groups_per_step, run.plan.trajectories_per_group) == (5, 32, 8)
    optimizer = run.optimizer
    assert (optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (1e-7, 0.9, 0.999, 0.01)
    assert (optimizer.clip_grad, optimizer.schedule, run.model.precision) == (1.0, "constant", "bf16")


def test_overrides_of_every_kind():
    run = load_recipe(
        "quickstart",
        [
            "plan.epochs=7",
            "optimizer.lr=1",
            "layout.sequence_parallel=true",
            "plan.trajectories_per_group=none",
            "paths.store=somewhere=else",
            "objective.weight=token",
            "objective.surrogate=shaped",
            "objective.surrogate.gamma=0.3",
            "objective.advantage=megatron_offgrpo.objective.advantages:rloo",
        ],
    )
    assert (run.plan.epochs, run.optimizer.lr, run.layout.sequence_parallel) == (7, 1.0, True)
    assert run.plan.trajectories_per_group is None
    assert run.paths.store == "somewhere=else"
    assert isinstance(run.objective.surrogate, partial)
    assert describe_callable(run.objective.surrogate)["args"] == {"gamma": 0.3}
    assert run.objective.advantage is advantages.rloo


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.epoch=3", r"--set plan\.epoch: no such setting.*did you mean plan\.epochs\?"),
        ("epochs=3", r"did you mean plan\.epochs\?"),
        ("plan.epochs.more=3", r"--set plan\.epochs\.more: no such setting"),
        ("plan=3", r"a section, not a setting.*plan\.epochs"),
        ("plan.epochs", r"not an override.*path=value"),
        ("layout..tp=3", r"layout\.\.tp=3: not an override.*path=value"),
        (".layout.tp=3", r"not an override.*path=value"),
        ("=3", r"not an override.*path=value"),
        ("plan.epochs=two", r"--set plan\.epochs: not a number.*got two"),
        ("plan.epochs=2.5", r"--set plan\.epochs: wrong type; expected int; got 2\.5"),
        ("layout.sequence_parallel=1", r"wrong type; expected bool"),
        (
            "objective.weight=tokens",
            r"expected constant or token or sequence or group; got tokens.*did you mean token\?",
        ),
        ("objective.surrogate=liner", r"--set objective\.surrogate: no such function"),
        ("objective.surrogate.gamma=1", r"no such argument.*got gamma"),
    ],
)
def test_a_wrong_override_is_one_clear_line(override, message):
    with pytest.raises(ConfigError, match=message):
        apply_override(load_recipe("quickstart"), override)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown recipe.*got quickstrat.*did you mean quickstart\?"):
        load_recipe("quickstrat")


def test_a_function_that_is_no_recipe():
    with pytest.raises(ConfigError, match="not a recipe"):
        load_recipe("time:time")


@pytest.mark.parametrize(
    "name", [":", "a:", ":b", "::", "time:time:time", ".recipes:f", "recipes..x:f", "a b:c", "recipes.quickstart:"]
)
def test_a_recipe_that_is_no_name(name):
    with pytest.raises(ConfigError, match=r"RECIPE: not a function's name; expected module:function; got '"):
        load_recipe(name)
    with pytest.raises(ConfigError, match="--recipe: not a function's name"):
        load_data_recipe(name)


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("", "mine:missing", r"RECIPE: no such function \(module 'mine' has no attribute 'missing'\)"),
        ("", "missing_module:f", r"no such function \(No module named 'missing_module'\)"),
        ("import absent_library", "mine:f", r"no such function \(No module named 'absent_library'\)"),
        ("x = 1\n1 / 0", "mine:f", r"cannot be imported \(ZeroDivisionError: division by zero at .*mine\.py:2\)"),
        ("def f(:", "mine:f", r"cannot be imported \(SyntaxError: invalid syntax"),
        ("raise SystemExit(3)", "mine:f", r"cannot be imported \(SystemExit: 3 at .*mine\.py:1\)"),
        ("from time import nothing", "mine:f", r"cannot be imported \(ImportError: cannot import name 'nothing'"),
        ("f = 3", "mine:f", "not a function"),
        (
            "def f(size): ...",
            "mine:f",
            r"mine:f: the recipe fails \(TypeError: .*'size'.*without arguments that returns",
        ),
        ("def f():\n    return {}['a']", "mine:f", r"the recipe fails \(KeyError: 'a' at .*mine\.py:2\)"),
        ("def f():\n    return 3", "mine:f", r"not a recipe; expected a function without arguments .* got int"),
    ],
)
def test_a_module_that_holds_no_recipe(code, name, message, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    importlib.invalidate_caches()
    for load in (load_recipe, load_data_recipe):
        with pytest.raises(ConfigError, match=message.replace("RECIPE", "(RECIPE|--recipe)")):
            load(name)
    with pytest.raises(ConfigError):
        apply_override(load_recipe("quickstart"), f"objective.surrogate={name}x")


def test_a_command_is_what_was_typed():
    run = load_recipe("recipes.quickstart:quickstart", ["paths.store=my store", "plan.epochs=3"])
    assert run.command("train", "--force") == (
        "offgrpo train recipes.quickstart:quickstart --set 'paths.store=my store' --set plan.epochs=3 --force"
    )
    assert to_dict(run)["name"] == "quickstart"
    assert "typed" not in to_dict(run)
    assert to_dict(run) == to_dict(load_recipe("quickstart", ["paths.store=my store", "plan.epochs=3"]))
