"""Evaluation of one model on one benchmark: sample, grade, summarise.

OUTPUT holds `samples.jsonl` (what the model wrote), `graded.jsonl` (the same with scores), `metrics.json` and
`manifest.json`. While it is being made, finished samples are in `OUTPUT.parts/`.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_offgrpo.artifacts import (
    MANIFEST,
    Manifest,
    atomic_folder,
    read_manifest,
    write_json_atomically,
    write_manifest,
)
from megatron_offgrpo.data.chat import decode
from megatron_offgrpo.data.grading import GradingPool
from megatron_offgrpo.data.judge import Judge, log_beside
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.evaluation.contamination import contamination
from megatron_offgrpo.evaluation.generation import (
    Completion,
)
from megatron_offgrpo.evaluation.grading import Solution, score
from megatron_offgrpo.evaluation.json_lines import json_line
from megatron_offgrpo.evaluation.majority import Vote, majority_right
from megatron_offgrpo.evaluation.sample_log import Key, SampleLogs, Shard, remove_parts
from megatron_offgrpo.evaluation.sampling import LazyBackend, draw_samples
from megatron_offgrpo.evaluation.summary import Tally, correctness, summarise, summary_of
from megatron_offgrpo.evaluation.task import EvaluationConfig, Task, make_task, without_unreadable
from megatron_offgrpo.progress import progress, say

__all__ = ["GRADED", "METRICS", "SAMPLES", "EvaluationConfig", "correctness", "evaluate", "read_graded", "summarise"]

SAMPLES, GRADED, METRICS = "samples.jsonl", "graded.jsonl", "metrics.json"


def evaluate(config: EvaluationConfig, lazy: LazyBackend | None = None) -> dict[str, Any]:
    """Samples, grades and summarises; returns what `metrics.json` holds. An equal evaluation on disk is reused.

    Args:
        lazy: a back end to share with other evaluations of the same model; None opens one.

    Raises:
        ConfigError, DataError: a setting, the model folder or the benchmark is wrong, or OUTPUT is something else.
        GenerationError: the back end failed; what it had finished is taken up by the next call.
    """
    task = make_task(config)
    reused = _finished(config.output, task.manifest)
    if reused is not None and not config.force:
        say(f"{config.output}: reused, nothing it was made from has changed")
        if config.store is not None:
            reused["contamination"] = _overlap(task)
            write_json_atomically(config.output / METRICS, reused)
        return reused
    task = without_unreadable(task)
    start = time.monotonic()
    logs = _sample(task, lazy, None)
    sampled = time.monotonic()
    with atomic_folder(config.output) as folder:
        figures = _grade(task, logs, folder)
        metrics = {
            **figures,
            "problems_left_out": task.left_out,
            "contamination": _overlap(task),
            "backend": task.backend,
            "sampling_seconds": sampled - start,
            "grading_seconds": time.monotonic() - sampled,
        }
        write_json_atomically(folder / METRICS, metrics)
        write_manifest(folder, task.manifest)
    remove_parts(task.run.parts)
    return metrics


def sample_shard(config: EvaluationConfig, shard: Shard, lazy: LazyBackend | None = None) -> None:
    """Draws one shard's samples into the work folder; `evaluate` later takes them up.

    Raises:
        as `evaluate`.
    """
    task = make_task(config)
    if _finished(config.output, task.manifest) is not None and not config.force:
        say(f"{config.output}: finished already, nothing it was made from has changed")
        return
    task = without_unreadable(task)
    logs = _sample(task, lazy, shard)
    say(f"{task.run.parts}: {len(logs)} of {len(task.run.all_keys())} samples of all shards are there")


def _finished(output: Path, manifest: Manifest) -> dict[str, Any] | None:
    """The metrics in OUTPUT if it holds this evaluation; None if it is absent or holds another one."""
    if not output.exists():
        return None
    if not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST).is_file()):
        raise ConfigError("would overwrite something else", where=str(output), remedy="choose another output folder")
    if not (output / MANIFEST).is_file():
        return None
    found = read_manifest(output, "evaluation", remedy="choose another output folder")
    if found.fingerprint != manifest.fingerprint or not (output / METRICS).is_file():
        return None
    metrics: dict[str, Any] = json.loads((output / METRICS).read_text(encoding="utf-8"))
    return metrics


def _sample(task: Task, lazy: LazyBackend | None, shard: Shard | None) -> SampleLogs:
    config, settings = task.config, task.run.settings
    share = f", shard {shard.index} of {shard.count}" if shard else ""
    say(f"evaluating {config.model} on {config.benchmark} with {task.backend}{share}")

    def describe(key: Key, completion: Completion) -> dict[str, Any]:
        if completion.text is not None:
            return {"text": completion.text}
        # Special tokens stay: thoughts may stand between some. Only the end that was sampled goes.
        ids = completion.without_end(settings.stop_token_ids)
        return {"text": decode(task.tokenizer, task.run.prompts[key[0]], ids)}

    if lazy is not None:
        return draw_samples(task.run, lazy, describe, shard)
    with LazyBackend(config.engine) as own:
        return draw_samples(task.run, own, describe, shard)


def _grade(task: Task, logs: SampleLogs, folder: Path) -> dict[str, Any]:
    """Writes samples and graded samples, problem by problem, and returns the figures."""
    config, by_id = task.config, {question.problem_id: question for question in task.questions}
    keys = task.run.all_keys()

    def solutions() -> Iterator[Solution]:
        for key in keys:
            asked = by_id[key[0]]
            yield Solution(asked.answer, logs.read(key)["text"], asked.choices, task.thinking[key[0]], asked.problem)

    judge = None
    if config.judge is not None:
        assert config.judge_model is not None
        judge = Judge(config.judge, config.judge_model, log_beside(config.output))
    tally = Tally()
    votes: dict[str, tuple[list[Vote], list[Vote]]] = {name: ([], []) for name in by_id}
    with (
        GradingPool(config.grading_processes, config.grading_seconds, think_tags=config.think_tags) as pool,
        (folder / SAMPLES).open("w", encoding="utf-8") as samples,
        (folder / GRADED).open("w", encoding="utf-8") as graded,
    ):
        with progress("grading", len(keys)) as advance:
            for key, scored in zip(keys, score(solutions(), pool, judge), strict=True):
                sample, asked = logs.read(key), by_id[key[0]]
                record = {
                    **sample,
                    "problem": asked.problem,
                    "answer": asked.answer,
                    "reward": scored.lenient,
                    "strict": scored.strict,
                    "has_box": scored.has_box,
                    "status": scored.status,
                    "extracted": scored.extracted,
                    "reason": scored.reason,
                }
                samples.write(json_line(sample))
                graded.write(json_line(record))
                tally.add(record)
                votes[key[0]][0].append(Vote(scored.extracted, scored.lenient == 1))
                votes[key[0]][1].append(Vote(scored.extracted if scored.has_box else None, scored.strict == 1))
                advance(1)
        figures = summary_of(tally, config.seed)
        letters = [bool(question.choices) for question in task.questions]
        for target, which in ((figures, 0), (figures["strict"], 1)):
            right = majority_right([votes[name][which] for name in by_id], pool, letters)
            target["majority"] = sum(right) / len(right)
    figures["judge"] = None if judge is None else dict(judge.counts)
    return figures


def _overlap(task: Task) -> dict[str, Any] | None:
    """Overlap of the benchmark with the training store; None where no store was named."""
    if task.config.store is None:
        return None
    overlap = contamination(task.questions, task.config.store)
    if overlap["overlapping"]:
        say(
            f"{task.config.benchmark}: {overlap['overlapping']} of {len(task.questions)} problems stand in "
            f"{task.config.store}, in whole or in part"
        )
    return overlap


def read_graded(folder: Path) -> list[dict[str, Any]]:
    """The graded samples of a finished evaluation.

    Raises:
        DataError: no finished evaluation there.
    """
    read_manifest(folder, "evaluation", remedy="run `offgrpo eval` with this output folder")
    with (folder / GRADED).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
