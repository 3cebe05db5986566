"""The audit of a store: one self-contained `data.html`, and the same figures for the terminal."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_offgrpo.config import RunConfig
from megatron_offgrpo.data.audit import Audit, quantiles
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.data.store_writer import DISAGREEMENTS_FILE, REJECTED_FILE, REMOVED_FILE
from megatron_offgrpo.data.summary import agreement_lines, listing, summary_lines
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.planning.members import epoch_members, member_signals
from megatron_offgrpo.reporting import plots
from megatron_offgrpo.reporting.page import details, figure, page, paragraph, section, table, tiles
from megatron_offgrpo.reporting.plots import BASE, RIGHT, WRONG

COMPOSITIONS = ("all_positive", "mixed", "all_negative")
COLORS = {"all_positive": RIGHT, "mixed": BASE, "all_negative": WRONG}
MAX_LISTED = 500
"""Lines of a list in the page; the file has all."""
SHOWN_CHARACTERS = 1500


@dataclass(frozen=True)
class Use:
    """What the objectives of some recipes, all alike here, make of the store."""

    recipes: tuple[str, ...]
    groups: int
    """Groups that it plans (validation set apart)."""
    dead: int
    """Groups in which every advantage is 0."""
    sums: dict[str, float]
    """Composition -> sum of |A| over its trajectories."""


def objective_uses(store: TrajectoryStore, recipes: Mapping[str, RunConfig]) -> list[Use]:
    """Dead groups and sum of |A| by composition, for each recipe that can be planned on this store."""
    names: dict[tuple[Any, ...], list[str]] = {}
    for name, run in recipes.items():
        try:
            members = epoch_members(store, run.plan)
            signals = member_signals(store, members, run.objective)
        except ConfigError:
            continue  # an objective that needs on-policy members, on a store without
        size = np.abs(signals.advantage)
        starts, ends = members.offsets[members.groups], members.offsets[members.groups + 1]
        total = np.concatenate([[0.0], np.cumsum(size)])
        by_group = total[ends] - total[starts]
        kinds = _kinds(signals.reward, starts, ends)
        sums = {kind: float(by_group[kinds == index].sum()) for index, kind in enumerate(COMPOSITIONS)}
        dead = int(sum(not size[start:end].any() for start, end in zip(starts, ends, strict=True)))
        names.setdefault((len(starts), dead, *sums.items()), []).append(name)
    return [Use(tuple(alike), groups, dead, dict(sums)) for (groups, dead, *sums), alike in names.items()]


def _kinds(rewards: Any, starts: Any, ends: Any) -> Any:
    """Index in COMPOSITIONS of each group."""
    right = np.concatenate([[0.0], np.cumsum(rewards == 1)])
    count = right[ends] - right[starts]
    return np.where(count == ends - starts, 0, np.where(count > 0, 1, 2))


def terminal_lines(store: TrajectoryStore, found: Audit, uses: list[Use]) -> list[str]:
    """The audit, for the terminal."""
    lines = [*summary_lines(store), ""]
    for name, values in _lengths(store).items():
        lines.append(f"{name:<24}" + ", ".join(f"{key} {value}" for key, value in quantiles(values).items()))
    lines.append("right of K              " + ", ".join(f"{right}/{size}: {n}" for right, size, n in _right_of(found)))
    for label, value in _duplicate_rows(found):
        lines.append(f"{label:<52}{value}")
    for use in uses:
        sums = ", ".join(f"{kind.replace('_', ' ')} {use.sums[kind]:.1f}" for kind in COMPOSITIONS)
        lines.append(
            f"{use.dead} of {use.groups} groups without a signal; sum of |A|: {sums}; {', '.join(use.recipes)}"
        )
    path = store.path / DISAGREEMENTS_FILE
    judged = [line for line in _lines_of(path) if line.get("given") != line.get("math-verify")]
    others = sum(1 for _ in _lines_of(path)) - len(judged)
    lines += [_disagreement_line(line) for line in judged]
    if others:
        lines.append(f"{others} more solutions on which only the majority differs: {path}")
    return lines


def write_data_report(store: TrajectoryStore, found: Audit, uses: list[Use], path: Path) -> Path:
    """Writes the page and returns its path."""
    sections = [
        f"<h1>{escape(f'Trajectory data: {store.path.name}')}</h1>",
        paragraph(f"Fingerprint {store.manifest.fingerprint}", "soft mono"),
        _tiles(store),
        _compositions(store, found),
        _length_section(store),
        _use_section(uses),
        _label_section(store),
        _duplicate_section(store, found),
        _left_out_section(store),
        _example_section(store, found),
        _provenance(store),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # Problems and solutions are text from outside: what UTF-8 cannot hold was refused on import.
    temporary.write_text(page(f"{store.path.name}: data", sections), encoding="utf-8")
    os.replace(temporary, path)
    return path


def _tiles(store: TrajectoryStore) -> str:
    counts = store.manifest.counts
    left_out = sum(counts.get("rejected", {}).values()) + sum(counts.get("removed", {}).values())
    return tiles(
        [
            (f"{store.num_groups:,}", "groups"),
            (f"{store.num_trajectories:,}", "solutions"),
            (f"{100 * store.rewards.mean():.1f} %", "of them right"),
            (f"{counts['response_tokens']:,}", "response tokens"),
            (f"{counts['truncated']:,}", "truncated"),
            (f"{counts.get('validation_groups', 0):,}", "groups for validation"),
            (f"{left_out:,}", "records and solutions left out"),
        ]
    )


def _compositions(store: TrajectoryStore, found: Audit) -> str:
    groups = store.manifest.counts["groups"]
    bars = [(kind.replace("_", " "), float(groups[kind]), COLORS[kind]) for kind in COMPOSITIONS]
    shares = [
        [kind.replace("_", " "), f"{groups[kind]:,}", _percent(groups[kind], groups["total"])] for kind in COMPOSITIONS
    ]
    rows = [[f"{right} of {size}", f"{n:,}", _percent(n, groups["total"])] for right, size, n in _right_of(found)]
    return section(
        "Groups by composition",
        figure(plots.bar_plot("compositions", bars, "groups"), "groups by composition", wide=True),
        table(["composition", "groups", "share"], shares, number_columns=(1, 2)),
        details("right solutions of a group", table(["right", "groups", "share"], rows, number_columns=(1, 2))),
    )


def _length_section(store: TrajectoryStore) -> str:
    lengths = _lengths(store)
    series = [
        ("right", lengths["right responses"].tolist(), RIGHT),
        ("wrong", lengths["wrong responses"].tolist(), WRONG),
    ]
    names = list(quantiles(lengths["prompts"]))
    rows = [
        [name, *(f"{value:,}" for value in quantiles(values).values())]
        for name, values in lengths.items()
        if len(values)
    ]
    return section(
        "Lengths in tokens",
        figure(plots.length_plot([one for one in series if one[1]]), "lengths of responses by reward", wide=True),
        table(["", *names], rows, number_columns=range(1, len(names) + 1)),
    )


def _use_section(uses: list[Use]) -> str:
    rows = [
        [
            ", ".join(use.recipes),
            f"{use.groups:,}",
            f"{use.dead:,}",
            _percent(use.dead, use.groups),
            *(f"{use.sums[kind]:,.1f}" for kind in COMPOSITIONS),
        ]
        for use in uses
    ]
    header = [
        "recipes",
        "groups",
        "without a signal",
        "share",
        *(f"|A| {kind.replace('_', ' ')}" for kind in COMPOSITIONS),
    ]
    note = "Without a signal: every advantage of the group is 0. |A|: sum over one epoch's trajectories by composition."
    return section(
        "What each objective would use", table(header, rows, number_columns=range(1, 7)), paragraph(note, "soft")
    )


def _label_section(store: TrajectoryStore) -> str:
    counts = store.manifest.counts
    lines = list(islice(_lines_of(store.path / DISAGREEMENTS_FILE), MAX_LISTED + 1))
    rows = [
        [
            f"{line['where']} #{line['trajectory']}",
            "; ".join(f"{name} {line[name]:.0f}" for name in ("given", "math-verify", "majority") if name in line),
            line["answer"],
            str(line["extracted"]),
            line["status"],
            line["end"],
        ]
        for line in lines[:MAX_LISTED]
    ]
    more = f" (the first {MAX_LISTED}; {DISAGREEMENTS_FILE} has all)" if len(lines) > MAX_LISTED else ""
    header = ["where", "labels", "reference answer", "final answer", "status", "end of the solution"]
    statuses = [[name, f"{count:,}"] for name, count in counts.get("labels", {}).items()]
    sources = [[name, f"{count:,}"] for name, count in counts.get("label_sources", {}).items()]
    return section(
        "Labels",
        table(["reward by", "solutions"], sources, number_columns=(1,)),
        table(["status", "solutions"], statuses, number_columns=(1,)),
        *(paragraph(line) for line in agreement_lines(counts)),
        details(f"every disagreement{more}", table(header, rows)),
    )


def _duplicate_section(store: TrajectoryStore, found: Audit) -> str:
    origins = store.table["origin"]
    near = [
        [origins[group].as_py(), origins[head].as_py(), f"{similarity:.2f}"]
        for group, head, similarity in found.near_duplicates[:MAX_LISTED]
    ]
    overlaps = [[origins[group].as_py(), partner, gram] for group, partner, gram in found.contaminated[:MAX_LISTED]]
    return section(
        "Duplicates and contamination",
        table(["", "count"], [[label, f"{value}"] for label, value in _duplicate_rows(found)], number_columns=(1,)),
        details("near-duplicate problems", table(["problem", "first of its cluster", "Jaccard"], near)),
        details("problems of a benchmark", table(["problem", "benchmark", "shared words"], overlaps)),
    )


def _left_out_section(store: TrajectoryStore) -> str:
    counts, parts = store.manifest.counts, []
    for name, file, what in (
        ("rejected", REJECTED_FILE, "Records that cannot be used"),
        ("removed", REMOVED_FILE, "Left out by the filters asked for"),
    ):
        rows = [[reason, f"{count:,}"] for reason, count in counts.get(name, {}).items()]
        lines = list(islice(_lines_of(store.path / file), MAX_LISTED + 1))
        keys = ["where", "group_id", "reason", "field", "expected", "got"] if name == "rejected" else REMOVED_COLUMNS
        listed = table(keys, [[_text(line.get(key)) for key in keys] for line in lines[:MAX_LISTED]])
        title = f"the first {MAX_LISTED} lines of {file}" if len(lines) > MAX_LISTED else f"all lines of {file}"
        body = table([what, "count"], rows, number_columns=(1,)) or paragraph(f"{what}: none.")
        parts.append(body + details(title, listed))
    stages = [[one["stage"], f"{one['groups']:,}", f"{one['trajectories']:,}"] for one in counts.get("stages", [])]
    return section(
        "What was left out",
        *parts,
        details(
            "what was left after each stage", table(["after", "groups", "solutions"], stages, number_columns=(1, 2))
        ),
    )


REMOVED_COLUMNS = ["where", "group_id", "trajectory", "reason", "detail", "partner"]


def _example_section(store: TrajectoryStore, found: Audit) -> str:
    blocks = []
    for kind in COMPOSITIONS:
        for group in found.examples[kind]:
            row = store.row(group)
            solutions = "".join(
                _solution("right" if reward == 1 else "wrong", f"{len(ids)} tokens{', cut' if cut else ''}", text)
                for reward, ids, cut, text in zip(row.rewards, row.response_ids, row.truncated, row.texts, strict=True)
            )
            asked = f"<p>{escape(row.problem)} <span class='soft'>Answer: {escape(row.answer or 'none')}</span></p>"
            body = f'<div class="example">{asked}<div class="pair">{solutions}</div></div>'
            blocks.append(details(f"{kind.replace('_', ' ')}: {row.group_id}", body))
    return section("Examples of each composition", *blocks)


def _solution(verdict: str, note: str, text: str) -> str:
    head = f'<span class="{verdict}">{verdict}</span> <span class="soft">{note}</span>'
    return f"<div>{head}\n{escape(_shortened(text))}</div>"


def _provenance(store: TrajectoryStore) -> str:
    manifest = store.manifest
    rows = [[name, value] for name, value in manifest.inputs.items()]
    rows.append(["command", " ".join(manifest.command)])
    settings = f'<pre class="mono">{escape(json.dumps(manifest.config, indent=2, ensure_ascii=False))}</pre>'
    return section("Provenance", table(["made from", ""], rows), details("settings", settings))


def _lengths(store: TrajectoryStore) -> dict[str, Any]:
    right = store.rewards == 1
    return {
        "prompts": store.prompt_lengths[store.group_offsets[:-1]],
        "right responses": store.response_lengths[right],
        "wrong responses": store.response_lengths[~right],
    }


def _right_of(found: Audit) -> list[tuple[int, int, int]]:
    return [(right, size, n) for (right, size), n in sorted(found.right_of.items(), key=lambda item: item[0][::-1])]


def _duplicate_rows(found: Audit) -> list[tuple[str, str]]:
    looked = "not looked for (--benchmark)" if not found.benchmarks else f"{len(found.contaminated)}"
    return [
        ("solutions equal to an earlier one of their group", f"{found.duplicate_trajectories}"),
        ("problems equal to an earlier one", f"{found.duplicate_problems}"),
        ("problems similar to an earlier one (0.8)", f"{len(found.near_duplicates)}"),
        ("problems of a benchmark", looked),
        ("problems with an unverifiable reference answer", _unverifiable(found)),
    ]


def _unverifiable(found: Audit) -> str:
    total = found.unverifiable.total()
    return f"{total} ({listing(dict(sorted(found.unverifiable.items())))})" if total else "0"


def _lines_of(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with path.open(encoding="ascii") as file:
            yield from map(json.loads, file)


def _disagreement_line(line: dict[str, Any]) -> str:
    labels = ", ".join(f"{name} {line[name]:.0f}" for name in ("given", "math-verify", "majority") if name in line)
    extracted = line["extracted"] if line["extracted"] is not None else f"no answer ({line['status']})"
    place = f"{line['where']} #{line['trajectory']}"
    return f"disagreement {place}: {labels}; reference {line['answer']!r}, found {extracted!r}"


def _text(value: Any) -> str:
    # A rejected group's name may hold what UTF-8 cannot.
    return "" if value is None else str(value).encode("utf-8", "backslashreplace").decode()


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}\n... {len(text):,} characters in all"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"
