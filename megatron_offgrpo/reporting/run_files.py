"""Reads what a run left on disk; what is absent is named, not hidden."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_offgrpo.artifacts import MANIFEST
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.errors import DataError
from megatron_offgrpo.evaluation.evaluate import GRADED, METRICS, correctness
from megatron_offgrpo.evaluation.statistics import Comparison, CorrectArray, compare
from megatron_offgrpo.training.quarantine import QUARANTINE_FILE

WEIGHT_CHECK = "weight_check.json"


@dataclass(frozen=True)
class EvaluationFiles:
    """One evaluation folder."""

    metrics: dict[str, Any]
    graded: list[dict[str, Any]]
    manifest: dict[str, Any]


@dataclass
class RunFiles:
    """Everything the report shows."""

    folder: Path
    steps: list[dict[str, float]]
    """One record a step, of metrics.jsonl."""
    manifest: dict[str, Any]
    """Of the training folder: configuration, inputs, code version."""
    summary: dict[str, Any]
    base: EvaluationFiles | None
    final: EvaluationFiles | None
    teacher_lengths: list[int] | None
    """Response tokens of each trajectory in the store."""
    groups: dict[str, int]
    """Number of groups by composition."""
    weight_check: dict[str, Any] = field(default_factory=dict)
    """What `offgrpo check-weights --output RUN_DIR/weight_check.json` found, or empty."""
    quarantine: dict[str, Any] = field(default_factory=dict)
    """The training folder's quarantine.json, or empty."""
    on_the_way: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)
    """Checkpoint's step, benchmark and metrics of each evaluation in RUN_DIR/eval_checkpoints."""
    absent: list[str] = field(default_factory=list)
    """What the report lacks, a sentence each."""

    def comparison(self) -> tuple[Comparison, list[tuple[str, float]]] | None:
        """Base against final on the same problems, and each problem's difference in accuracy; None without both.

        Raises:
            DataError: the two evaluations are of different problems.
        """
        if self.base is None or self.final is None:
            return None
        base, final = _by_problem(self.base.graded), _by_problem(self.final.graded)
        if list(base) != list(final):
            raise DataError("base and trained model were evaluated on different problems", where=str(self.folder))
        differences = [(name, final[name] - base[name]) for name in base]
        return compare(_correct(self.base), _correct(self.final)), differences


def read_run(folder: Path) -> RunFiles:
    """Reads RUN_DIR: `train/` (or RUN_DIR itself where it is a training folder), `eval_base/`, `eval_final/`,
    `eval_checkpoints/`, `summary.json`, `weight_check.json`.

    Raises:
        DataError: neither training metrics nor an evaluation is there, or a file is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError("no such run folder", where=str(folder))
    absent: list[str] = []
    train = folder / "train" if (folder / "train").is_dir() else folder
    steps = _lines(train / "metrics.jsonl") if (train / "metrics.jsonl").is_file() else []
    if not steps:
        absent.append(f"No training curves: {train.name}/metrics.jsonl is absent or empty.")
    manifest = _json(train / MANIFEST) if (train / MANIFEST).is_file() else {}
    if not manifest:
        absent.append(f"No configuration: {train.name}/{MANIFEST} is absent.")
    summary = _json(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    if not summary:
        absent.append("No stage times: summary.json is absent.")
    base, final = (_evaluation(folder / name, absent) for name in ("eval_base", "eval_final"))
    if not steps and base is None and final is None:
        raise DataError(
            "nothing to report",
            where=str(folder),
            expected="train/metrics.jsonl, eval_base/ or eval_final/",
            remedy="give the folder that `offgrpo quickstart` or `offgrpo train` wrote",
        )
    store = _store(folder, manifest, absent)
    groups = summary.get("groups") or (store.manifest.counts["groups"] if store else {})
    lengths = [int(length) for length in store.response_lengths] if store else None
    check = _json(folder / WEIGHT_CHECK) if (folder / WEIGHT_CHECK).is_file() else {}
    out = _json(train / QUARANTINE_FILE) if (train / QUARANTINE_FILE).is_file() else {}
    return RunFiles(
        folder, steps, manifest, summary, base, final, lengths, groups, check, out, _on_the_way(folder), absent
    )


def _on_the_way(folder: Path) -> list[tuple[int, str, dict[str, Any]]]:
    """What `offgrpo eval --checkpoints ... --output RUN_DIR/eval_checkpoints` has finished."""
    found = []
    for checkpoint in sorted((folder / "eval_checkpoints").glob("iter_*")):
        for path in sorted(checkpoint.rglob(METRICS)):
            benchmark = _json(path.parent / MANIFEST)["config"].get("benchmark", "")
            found.append((int(checkpoint.name.removeprefix("iter_")), benchmark, _json(path)))
    return found


def _evaluation(folder: Path, absent: list[str]) -> EvaluationFiles | None:
    if not (folder / MANIFEST).is_file():
        which = "base model" if folder.name == "eval_base" else "trained model"
        absent.append(f"No accuracy of the {which}: {folder.name}/ holds no finished evaluation.")
        return None
    return EvaluationFiles(_json(folder / METRICS), _lines(folder / GRADED), _json(folder / MANIFEST))


def _store(folder: Path, manifest: dict[str, Any], absent: list[str]) -> TrajectoryStore | None:
    """The run's store, where it still lies at the path in the configuration and is the one the run was made from."""
    path = manifest.get("config", {}).get("paths", {}).get("store")
    candidates = [Path(path)] if path else []
    for candidate in [*candidates, folder / "store"]:
        if (candidate / MANIFEST).is_file():
            store = TrajectoryStore.open(candidate)
            if store.manifest.fingerprint == manifest.get("inputs", {}).get("store"):
                return store
    absent.append("No lengths of the teacher's responses: the store the run was made from is no longer at its path.")
    return None


def _correct(evaluation: EvaluationFiles) -> CorrectArray:
    return correctness(evaluation.graded)


def _by_problem(graded: list[dict[str, Any]]) -> dict[str, float]:
    rewards: dict[str, list[int]] = {}
    for record in graded:
        rewards.setdefault(record["problem_id"], []).append(record["reward"])
    return {name: sum(values) / len(values) for name, values in rewards.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise DataError(f"unreadable ({cause})", where=str(path), expected="JSON") from None
    if not isinstance(value, dict):
        raise DataError("not an object", where=str(path), expected="{...}", got=type(value).__name__)
    return value


def _lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines; a last line cut off by a kill is left out."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]
    except (OSError, ValueError) as cause:
        raise DataError(f"unreadable ({cause})", where=str(path), expected="one JSON object a line") from None
