"""What a person wants to know of a store, for the terminal."""

from typing import Any

from megatron_offgrpo.data.judge import judge_line, log_beside
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.data.store_writer import REJECTED_FILE, REMOVED_FILE


def listing(counts: dict[str, Any]) -> str:
    """`name count, name count`."""
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def summary_lines(store: TrajectoryStore) -> list[str]:
    """Groups, solutions, tokens, labels, and what was left out."""
    counts = store.manifest.counts
    groups = counts["groups"]
    apart = counts.get("validation_groups", 0)
    lines = [
        f"store      {store.path} (fingerprint {store.manifest.fingerprint})",
        f"groups     {groups['total']}: {groups['all_positive']} all positive, {groups['mixed']} mixed, "
        f"{groups['all_negative']} all negative" + (f"; {apart} of them set apart for validation" if apart else ""),
        f"solutions  {counts['trajectories']} ({counts.get('trajectories_not_selected', 0)} more were not selected), "
        f"{counts['truncated']} truncated",
        f"tokens     {counts['prompt_tokens']} in prompts, {counts['response_tokens']} in responses",
        f"labels     {listing(counts.get('label_sources', {}))} ({listing(counts.get('labels', {}))})",
    ]
    lines += [f"agreement  {line}" for line in agreement_lines(counts)]
    if counts.get("judge"):
        lines.append(f"judge      {judge_line(counts['judge'])} (see {log_beside(store.path)})")
    for name, file in (("rejected", REJECTED_FILE), ("removed", REMOVED_FILE)):
        if counts.get(name):
            lines.append(f"{name:<11}{listing(counts[name])} (see {store.path / file})")
    if counts.get("records_not_asked_for"):
        lines.append(f"skipped    {counts['records_not_asked_for']} records not asked for")
    if counts.get("responses_with_turns_inside"):
        lines.append(f"turns      {counts['responses_with_turns_inside']} responses go on after an end of turn")
    if counts.get("ignored_fields"):
        lines.append("ignored    fields " + listing(counts["ignored_fields"]))
    return lines


def agreement_lines(counts: dict[str, Any]) -> list[str]:
    """One line for each pair of labels that some trajectories have both of."""
    lines = []
    for pair, found in counts.get("agreement", {}).items():
        share = 100 * found["agree"] / found["compared"]
        differing = listing({name: found[name] for name in found if name not in ("compared", "agree")})
        lines.append(f"{pair}: {found['agree']} of {found['compared']} ({share:.2f} %); {differing}")
    return lines


def stage_lines(counts: dict[str, Any]) -> list[str]:
    """What is left after each stage."""
    return [f"{one['stage']:<24}{one['groups']:>10}{one['trajectories']:>12}" for one in counts.get("stages", [])]
