"""Evaluation of one model on one benchmark: sample, grade, summarise.

OUTPUT holds `samples.jsonl` (what the model wrote), `graded.jsonl` (the same with scores), `metrics.json` and
`manifest.json`. While it is being made, finished samples are in `OUTPUT.parts/`.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_offgrpo.artifacts import (
    MANIFEST,
    Manifest,
    atomic_folder,
    fingerprint_of,
    fingerprint_of_files,
    read_manifest,
    write_json_atomically,
    write_manifest,
)
from megatron_offgrpo.config import to_dict
from megatron_offgrpo.data.grading import GradingPool
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.evaluation.benchmarks import Question, find_benchmark
from megatron_offgrpo.evaluation.generation import (
    HF_BATCH,
    BackendConfig,
    Completion,
    SamplingSettings,
    choose_backend,
    stop_token_ids,
)
from megatron_offgrpo.evaluation.grading import Solution, score, unreadable_golds
from megatron_offgrpo.evaluation.json_lines import json_line
from megatron_offgrpo.evaluation.majority import Vote, majority_right
from megatron_offgrpo.evaluation.prompts import TemplateName, encode_prompt, load_prompt_tokenizer, opens_thinking
from megatron_offgrpo.evaluation.sample_log import Key, SampleLogs, Shard, remove_parts
from megatron_offgrpo.evaluation.sampling import LazyBackend, SamplingRun, draw_samples
from megatron_offgrpo.evaluation.summary import Tally, correctness, summarise, summary_of
from megatron_offgrpo.progress import progress, say

__all__ = ["GRADED", "METRICS", "SAMPLES", "EvaluationConfig", "correctness", "evaluate", "read_graded", "summarise"]

SAMPLES, GRADED, METRICS = "samples.jsonl", "graded.jsonl", "metrics.json"
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.bin")
PRESETS: dict[str, dict[str, Any]] = {
    "krafton": {"samples": 64, "temperature": 0.6, "top_p": 0.95, "max_tokens": 32768},
}
"""Published sampling settings, by name."""


@dataclass(frozen=True)
class EvaluationConfig:
    """One model on one benchmark."""

    model: Path
    """Hugging Face folder."""
    benchmark: Path | str
    """Name of a benchmark, or file of `problem`, `answer`, optional `id` records; see `find_benchmark`."""
    output: Path
    samples: int = 4
    """Samples per problem (k of avg@k)."""
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 32768
    seed: int = 0
    system: str | None = None
    """System message of the chat template; None sends none."""
    template: TemplateName = "chat"
    data_dir: Path | None = None
    """Folder with the files of named benchmarks; None loads them from the hub."""
    leave_out_unreadable: bool = False
    """Leave out problems whose reference answer cannot be read, instead of refusing the benchmark."""
    contamination: str = ""
    """A note on the overlap of benchmark and training data, kept with the figures."""
    backend: BackendConfig | None = None
    """None: vLLM where it is installed, else Hugging Face, with the model above."""
    grading_processes: int | None = None
    """None: one for each CPU."""
    grading_seconds: float = 5.0
    force: bool = False
    """Evaluate again although OUTPUT holds the same evaluation."""

    @property
    def engine(self) -> BackendConfig:
        return self.backend or BackendConfig(self.model)


def evaluate(config: EvaluationConfig, lazy: LazyBackend | None = None) -> dict[str, Any]:
    """Samples, grades and summarises; returns what `metrics.json` holds. An equal evaluation on disk is reused.

    Args:
        lazy: a back end to share with other evaluations of the same model; None opens one.

    Raises:
        ConfigError, DataError: a setting, the model folder or the benchmark is wrong, or OUTPUT is something else.
        GenerationError: the back end failed; what it had finished is taken up by the next call.
    """
    task = _task(config)
    reused = _finished(config.output, task.manifest)
    if reused is not None and not config.force:
        say(f"{config.output}: reused, nothing it was made from has changed")
        return reused
    start = time.monotonic()
    logs = _sample(task, lazy, None)
    sampled = time.monotonic()
    with atomic_folder(config.output) as folder:
        figures = _grade(task, logs, folder)
        metrics = {
            **figures,
            "problems_left_out": task.left_out,
            "contamination": config.contamination,
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
    task = _task(config)
    if _finished(config.output, task.manifest) is not None and not config.force:
        say(f"{config.output}: finished already, nothing it was made from has changed")
        return
    logs = _sample(task, lazy, shard)
    say(f"{task.run.parts}: {len(logs)} of {len(task.run.all_keys())} samples of all shards are there")


@dataclass(frozen=True)
class _Task:
    """A checked configuration with what it names."""

    config: EvaluationConfig
    backend: str
    questions: list[Question]
    left_out: int
    tokenizer: Any
    thinking: dict[str, bool]
    """Problem id -> whether its prompt ends inside `<think>`."""
    run: SamplingRun
    manifest: Manifest


def _task(config: EvaluationConfig) -> _Task:
    if config.samples < 1:
        raise ConfigError("must be at least 1", where="samples", got=config.samples)
    if not (config.model / "config.json").is_file():
        raise DataError("no Hugging Face model here", where=str(config.model), expected="a folder with config.json")
    backend = choose_backend(config.engine.backend)
    tokenizer = load_prompt_tokenizer(config.model, config.template)
    settings = SamplingSettings(
        config.temperature, config.top_p, config.max_tokens, stop_token_ids(config.model, tokenizer)
    )
    found = find_benchmark(str(config.benchmark), config.data_dir)
    questions = _readable(config, found)
    prompts = {
        one.problem_id: encode_prompt(tokenizer, one.problem, config.system, config.template) for one in questions
    }
    thinking = {name: opens_thinking(tokenizer.decode(ids[-8:])) for name, ids in prompts.items()}
    manifest = _manifest(config, settings, backend, questions)
    run = SamplingRun(
        prompts,
        config.samples,
        config.seed,
        settings,
        HF_BATCH if backend == "hf" else None,
        config.output.absolute().with_name(config.output.name + ".parts") / manifest.fingerprint,
    )
    return _Task(config, backend, questions, len(found) - len(questions), tokenizer, thinking, run, manifest)


def _readable(config: EvaluationConfig, questions: list[Question]) -> list[Question]:
    """The questions whose reference answers can be read, before anything is sampled.

    Raises:
        DataError: some cannot, and `leave_out_unreadable` is not set.
    """
    open_ones = [one for one in questions if not one.choices]
    if not open_ones:
        return questions
    with GradingPool(1, config.grading_seconds) as pool:
        bad = {open_ones[index].problem_id for index in unreadable_golds((one.answer for one in open_ones), pool)}
    if not bad:
        return questions
    shown = [f"{one.problem_id}: {one.answer!r}" for one in questions if one.problem_id in bad]
    if not config.leave_out_unreadable or len(bad) == len(questions):
        raise DataError(
            f"{len(bad)} of {len(questions)} reference answers cannot be read as mathematics",
            where=str(config.benchmark),
            got="; ".join(shown[:5]) + ("; ..." if len(shown) > 5 else ""),
            remedy="mend them, or pass --leave-out-unreadable (they are then counted, not scored)",
        )
    say(f"{config.benchmark}: {len(bad)} problem(s) left out, their answers cannot be read: {'; '.join(shown[:5])}")
    return [one for one in questions if one.problem_id not in bad]


def model_fingerprint(folder: Path) -> str:
    """Of the files that make a Hugging Face model."""
    return fingerprint_of_files([path for pattern in MODEL_FILES for path in folder.glob(pattern)])


def _manifest(
    config: EvaluationConfig, settings: SamplingSettings, backend: str, questions: list[Question]
) -> Manifest:
    inputs = {
        "model": model_fingerprint(config.model),
        "benchmark": fingerprint_of([asdict(question) for question in questions]),
    }
    engine = config.engine
    where = [backend, engine.precision, engine.server_url, engine.server_model]
    meaning = [asdict(settings), config.samples, config.seed, config.system, config.template, where]
    counts = {"problems": len(questions), "samples": len(questions) * config.samples}
    return Manifest("evaluation", fingerprint_of(inputs, meaning), inputs, counts, plain(to_dict(config)))


def plain(value: Any) -> Any:
    """A configuration as JSON-able values: paths as texts."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    return str(value) if isinstance(value, Path) else value


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


def _sample(task: _Task, lazy: LazyBackend | None, shard: Shard | None) -> SampleLogs:
    config = task.config
    share = f", shard {shard.index} of {shard.count}" if shard else ""
    say(f"evaluating {config.model} on {config.benchmark} with {task.backend}{share}")

    def describe(_: Key, completion: Completion) -> dict[str, Any]:
        if completion.text is not None:
            return {"text": completion.text}
        return {"text": task.tokenizer.decode(completion.token_ids, skip_special_tokens=True)}

    if lazy is not None:
        return draw_samples(task.run, lazy, describe, shard)
    with LazyBackend(config.engine) as own:
        return draw_samples(task.run, own, describe, shard)


def _grade(task: _Task, logs: SampleLogs, folder: Path) -> dict[str, Any]:
    """Writes samples and graded samples, problem by problem, and returns the figures."""
    config, by_id = task.config, {question.problem_id: question for question in task.questions}
    keys = task.run.all_keys()

    def solutions() -> Iterator[Solution]:
        for key in keys:
            asked = by_id[key[0]]
            yield Solution(asked.answer, logs.read(key)["text"], asked.choices, task.thinking[key[0]])

    tally = Tally()
    votes: dict[str, tuple[list[Vote], list[Vote]]] = {name: ([], []) for name in by_id}
    with (
        GradingPool(config.grading_processes, config.grading_seconds) as pool,
        (folder / SAMPLES).open("w", encoding="utf-8") as samples,
        (folder / GRADED).open("w", encoding="utf-8") as graded,
    ):
        with progress("grading", len(keys)) as advance:
            for key, scored in zip(keys, score(solutions(), pool), strict=True):
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
    return figures


def read_graded(folder: Path) -> list[dict[str, Any]]:
    """The graded samples of a finished evaluation.

    Raises:
        DataError: no finished evaluation there.
    """
    read_manifest(folder, "evaluation", remedy="run `offgrpo eval` with this output folder")
    with (folder / GRADED).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
