"""Every number of the configuration has a range, and every choice its choices; both are checked where they are set."""

import math
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from annotated_types import Ge, Gt, Le, Lt

from megatron_offgrpo import config, data_config
from megatron_offgrpo.cli import main
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.evaluation.generate import GenerateConfig
from megatron_offgrpo.evaluation.generation import BackendConfig, SamplingSettings, Shaping
from megatron_offgrpo.evaluation.task import EvaluationConfig
from megatron_offgrpo.launch.chain import ChainOptions
from megatron_offgrpo.launch.settings import LaunchSettings
from megatron_offgrpo.ranges import Ranged, constraints
from megatron_offgrpo.recipe import apply_override, load_recipe
from tools.study.settings import StudySettings

RUN = load_recipe("quickstart")
SECTIONS = {type(getattr(RUN, field.name)): getattr(RUN, field.name) for field in fields(RUN)}
EXAMPLES = {
    config.RunConfig: RUN,
    **{kind: value for kind, value in SECTIONS.items() if is_dataclass(kind)},
    data_config.FilterConfig: data_config.FilterConfig(),
    data_config.PrepareConfig: data_config.PrepareConfig(),
    ChainOptions: ChainOptions(),
    LaunchSettings: LaunchSettings("local", "/h", "/w", "python"),
    EvaluationConfig: EvaluationConfig(Path("m"), "b", Path("o")),
    GenerateConfig: GenerateConfig(Path("m"), "b", Path("o")),
    BackendConfig: BackendConfig(Path("m")),
    Shaping: Shaping(),
    SamplingSettings: SamplingSettings(),
}
"""One value of each dataclass of the configuration."""


LISTS = {"lrs", "seeds", "stop_token_ids"}
"""Fields of the study, which checks their numbers itself, and of a tokenizer."""


def kinds_in(hint):
    """All types that stand in a hint."""
    yield hint
    for inner in get_args(hint) if not isinstance(hint, (Ge, Gt, Le, Lt)) else ():
        yield from kinds_in(inner)


def numeric_fields(kind):
    hints = get_type_hints(kind, include_extras=True)
    return {
        field.name
        for field in fields(kind)
        if {int, float} & {k for k in kinds_in(hints[field.name]) if isinstance(k, type)}
    }


def test_every_dataclass_of_the_configuration_is_looked_at():
    modules = (config, data_config)
    here = {
        one for module in modules for one in vars(module).values() if getattr(one, "__module__", "") == module.__name__
    }
    here = {one for one in here if is_dataclass(one)}
    assert here <= set(EXAMPLES)


@pytest.mark.parametrize("kind", [*EXAMPLES, StudySettings], ids=lambda kind: kind.__name__)
def test_every_numeric_field_has_a_range(kind):
    found = {name: bounds for name, kind_of_field, bounds in constraints(kind) if kind_of_field in (int, float)}
    wanted = numeric_fields(kind) - LISTS
    assert found.keys() == wanted
    assert all(bounds for bounds in found.values()), found
    assert not wanted or issubclass(kind, Ranged)


def test_a_whole_number_that_overflows_is_refused():
    with pytest.raises(ConfigError, match=r"plan\.max_pack_tokens: out of range; expected at most 4294967296"):
        apply_override(RUN, "plan.max_pack_tokens=" + "1" + "0" * 20)


def limits():
    for kind in EXAMPLES:
        for name, number, bounds in constraints(kind):
            if number in (int, float):
                step = 1 if number is int else 1e-9
                for bound in bounds:
                    match bound:
                        case Ge(ge=low):
                            yield kind, name, low - step, low
                        case Gt(gt=low):
                            yield kind, name, low, low + step
                        case Le(le=high):
                            yield kind, name, high + step, high
                        case Lt(lt=high):
                            yield kind, name, high, high - step


@pytest.mark.parametrize(("kind", "name", "outside", "inside"), limits())
def test_the_ends_of_every_range(kind, name, outside, inside):
    assert getattr(replace(EXAMPLES[kind], **{name: inside}), name) == inside
    with pytest.raises(ConfigError, match=r"out of range; expected a (whole|finite) number (at|above|below)"):
        replace(EXAMPLES[kind], **{name: outside})


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
def test_neither_nan_nor_infinity_nor_another_type(kind):
    for name, number, _ in constraints(kind):
        wrong = (
            [math.nan, math.inf, -math.inf, True, "1"] if number is float else [True, 1.0, math.nan, "1", "no choice"]
        )
        for value in wrong:
            with pytest.raises(ConfigError, match=r"out of range|not a choice"):
                replace(EXAMPLES[kind], **{name: value})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("layout.tp=0", "layout.tp: out of range; expected a whole number at least 1; got 0"),
        ("layout.pp=-2", "layout.pp: out of range"),
        ("layout.processes=0", "layout.processes: out of range"),
        ("optimizer.lr=-1e-6", "optimizer.lr: out of range; expected a finite number at least 0; got -1e-06"),
        ("optimizer.lr=1e999", "optimizer.lr: out of range; expected a finite number at least 0; got inf"),
        ("optimizer.beta2=1", "optimizer.beta2: out of range; expected a finite number at least 0 and below 1"),
        ("optimizer.eps=0", "optimizer.eps: out of range; expected a finite number above 0"),
        ("plan.epochs=0", "plan.epochs: out of range"),
        ("plan.trajectories_per_group=0", "plan.trajectories_per_group: out of range"),
        ("checkpoint.keep=-1", "checkpoint.keep: out of range"),
        ("fault.timeout_seconds=0", "fault.timeout_seconds: out of range"),
        ("seed=-1", "seed: out of range; expected a whole number at least 0 and below 4294967296; got -1"),
        ("objective.kl.clamp=1e999", "--set objective.kl.clamp: not a finite number"),
        ("typed=x", "--set typed: no such setting"),
    ],
)
def test_set_is_refused_in_one_line(setting, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["offgrpo", "plan", "quickstart", "--set", setting])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-prompt-tokens", "0"),
        ("--min-pass-rate", "nan"),
        ("--validation-share", "0.95"),
        ("--max-compression-ratio", "-1"),
        ("--min-response-tokens", "-1"),
        ("--near-duplicates", "inf"),
        ("--seed", "-1"),
    ],
)
def test_options_of_prepare_are_refused_by_their_names(option, value, monkeypatch, capsys):
    arguments = ["offgrpo", "prepare", "--input", "a.jsonl", "--tokenizer", "T", "--output", "O", option, value]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: {option}: out of range; expected a ")
