"""The published objectives of recipes/: each computes a loss, is stored by name, and stands in the documentation."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch

from megatron_offgrpo.config import ObjectiveConfig
from megatron_offgrpo.config_values import resolve_callable, to_dict
from megatron_offgrpo.objective.compose import offline_grpo_loss
from recipes import objectives
from tests.unit.objective.test_compose import random_terms

PUBLISHED = {
    name: function
    for name, function in inspect.getmembers(objectives, inspect.isfunction)
    if function.__module__ == objectives.__name__ and not name.startswith("_")
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_has_a_finite_loss_and_a_gradient(name):
    objective = PUBLISHED[name]()
    assert isinstance(objective, ObjectiveConfig)
    terms = dataclasses.replace(random_terms(), mu=random_terms().logp.detach() + 0.01)
    loss, _ = offline_grpo_loss(terms, objective)
    (gradient,) = torch.autograd.grad(loss, terms.logp)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert (gradient != 0).any()


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_is_stored_by_name(name):
    objective = PUBLISHED[name]()
    stored = to_dict(objective)["surrogate"]
    function = getattr(objective.surrogate, "func", objective.surrogate)
    assert resolve_callable(stored["call"], where="surrogate") is function


def test_the_documentation_lists_them_all():
    text = (Path(__file__).resolve().parents[3] / "docs" / "objective.md").read_text(encoding="utf-8")
    listed = text.split("has the published objectives")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == set(PUBLISHED)
