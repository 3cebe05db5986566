"""The records that pass between the stages."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TrajectoryRecord:
    """One solution of a problem, as text."""

    text: str
    """The response, without the prompt and without EOS."""
    reward: float | None = None
    """0/1 verifiable reward; None until it is labelled."""
    logprobs: tuple[float, ...] | None = None
    """Behaviour log-probs mu_t of the generator, one per response token (natural log); None if unknown."""
    source: str | None = None
    """Who wrote it (model name), free text."""
    on_policy: bool = False
    """True for the student's own rollouts."""
    sample_id: str | None = None
    finish_reason: str | None = None
    """`length` where the generator cut the text at its limit: the response then gets no EOS."""


@dataclass(frozen=True)
class GroupRecord:
    """One problem with its solutions: a trajectory group."""

    group_id: str
    problem: str
    answer: str
    trajectories: tuple[TrajectoryRecord, ...]
    system: str | None = None
    origin: str = field(default="", compare=False)
    """file:line it was read from, for error messages."""


@dataclass(frozen=True)
class TokenizedTrajectory:
    """One trajectory as token ids."""

    prompt_ids: npt.NDArray[np.int32]
    response_ids: npt.NDArray[np.int32]
    """Ends in EOS unless it was cut at the maximum length."""
    behaviour_logprobs: npt.NDArray[np.float32] | None
    """mu_t per response token, or None."""
