"""Which usable trajectories and groups are left out, and why: (reason, what was found and asked for)."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_offgrpo.data.labelling import LabelledGroup
from megatron_offgrpo.data.text_measures import compression_ratio, foreign_share
from megatron_offgrpo.data_config import FilterConfig


@dataclass(frozen=True)
class Finding:
    """Why a trajectory or a group is left out."""

    reason: str
    detail: str
    partner: str | None = None


def problem_finding(problem: str, filters: FilterConfig) -> Finding | None:
    """Whether a problem is left out for its language."""
    share = foreign_share(problem)
    if share > filters.max_foreign_share:
        return Finding("foreign problem", f"{share:.2f} of the letters foreign, at most {filters.max_foreign_share}")
    return None


def needs_token_counts(filters: FilterConfig) -> bool:
    """Whether trajectories must be tokenised before they are selected."""
    return filters.min_response_tokens > 0 or filters.drop_truncated


def trajectory_findings(
    labelled: LabelledGroup, filters: FilterConfig, token_counts: Sequence[int] | None, max_response_tokens: int
) -> dict[int, Finding]:
    """Index -> why, for the trajectories of a group that are left out.

    Args:
        token_counts: tokens of each response, EOS included; None where `needs_token_counts` is False.
    """
    found: dict[int, Finding] = {}
    first_with: dict[str, int] = {}
    for index, (one, status) in enumerate(zip(labelled.group.trajectories, labelled.statuses, strict=True)):
        count = None if token_counts is None else token_counts[index]
        finding = _finding(one.text, status, filters, count, max_response_tokens)
        if finding is None and filters.duplicate_trajectories:
            first = first_with.setdefault(one.text.strip(), index)
            if first != index:
                partner = f"{labelled.group.origin} trajectory {first}"
                finding = Finding("duplicate trajectory", "the same text", partner)
        if finding is not None:
            found[index] = finding
    return found


def _finding(
    text: str, status: str, filters: FilterConfig, num_tokens: int | None, max_response_tokens: int
) -> Finding | None:
    if filters.drop_without_answer and status == "no_answer":
        return Finding("no final answer", "no boxed or other final answer found")
    if num_tokens is not None and num_tokens < filters.min_response_tokens:
        return Finding("short response", f"{num_tokens} tokens, at least {filters.min_response_tokens}")
    if filters.drop_truncated and num_tokens is not None and num_tokens > max_response_tokens:
        return Finding("long response", f"{num_tokens} tokens, at most {max_response_tokens}")
    share = foreign_share(text) if filters.max_foreign_share < 1.0 else 0.0
    if share > filters.max_foreign_share:
        return Finding("foreign response", f"{share:.2f} of the letters foreign, at most {filters.max_foreign_share}")
    if filters.max_compression_ratio is not None:
        ratio = compression_ratio(text)
        if ratio > filters.max_compression_ratio:
            return Finding("repetition loop", f"compression ratio {ratio:.1f}, at most {filters.max_compression_ratio}")
    return None


def group_finding(rewards: Sequence[float], num_left: int, filters: FilterConfig) -> Finding | None:
    """Whether a group is left out, by the pass rate of all its labelled trajectories and the number that is left."""
    rate = sum(rewards) / len(rewards)
    if not filters.min_pass_rate <= rate <= filters.max_pass_rate:
        return Finding("pass rate", f"{rate:.3f}, asked for {filters.min_pass_rate} to {filters.max_pass_rate}")
    if num_left < max(1, filters.min_trajectories):
        return Finding("too few trajectories", f"{num_left} left, at least {max(1, filters.min_trajectories)}")
    return None
