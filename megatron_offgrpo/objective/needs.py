"""What a surrogate declares about itself: the unit of one value, and what it reads besides logp, mu and A.

token: f(logp, mu, advantage), any shape; one value per response token.

trajectory: f(logp, mu, advantage, num_tokens) on vectors over trajectories, logp and mu summed over the response
tokens; one value per trajectory, which each of its tokens carries, so that `sequence` weights 1 / (B |o_i|) average
over trajectories.

group: the same arguments for the members of one group; one value for the group, which each of its members' tokens
carries, so that `group` weights average over groups. The plan keeps a group in one pack. Objectives on pairs form
their pairs inside a group and have this unit: no trajectory is computed twice, however many pairs it is in.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from megatron_offgrpo.config import ObjectiveConfig

Unit = Literal["token", "trajectory", "group"]
Extra = Literal["ref", "on_policy"]
Behaviour = Literal["optional", "on_policy", "required"]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Needs:
    """The declaration; its defaults hold for a function without one."""

    unit: Unit = "token"
    takes: tuple[Extra, ...] = ()
    """Keyword arguments it is called with: `ref`, reference log-probs (sums, for units above the token), which makes
    the run read the reference cache; `on_policy`, bool, unit token only."""
    behaviour: Behaviour = "optional"
    """Behaviour log-probs of the trajectories: `required` of all, or of the `on_policy` ones; without any, mu = 0."""


def needs(unit: Unit = "token", takes: tuple[Extra, ...] = (), behaviour: Behaviour = "optional") -> Callable:
    """Attaches a declaration to a function."""

    def declare(function: Function) -> Function:
        function.needs = Needs(unit, takes, behaviour)  # type: ignore[attr-defined]
        return function

    return declare


def needs_of(surrogate: Callable[..., Any]) -> Needs:
    """The declaration of a surrogate, or of a functools.partial of one."""
    while isinstance(surrogate, functools.partial):
        surrogate = surrogate.func
    return getattr(surrogate, "needs", Needs())


def needs_reference(objective: ObjectiveConfig) -> bool:
    """Whether the loss reads reference log-probs: for its KL term, or inside the surrogate."""
    return bool(objective.beta) or "ref" in needs_of(objective.surrogate).takes
