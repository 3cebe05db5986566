"""Evaluation of one model on one benchmark: sample, grade, summarise.

OUTPUT holds `samples.jsonl` (what the model wrote), `graded.jsonl` (the same with rewards), `metrics.json` and
`manifest.json`.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_offgrpo.artifacts import (
    MANIFEST,
    Manifest,
    atomic_folder,
    fingerprint_of,
    fingerprint_of_file,
    fingerprint_of_files,
    read_manifest,
    write_json_atomically,
    write_manifest,
)
from megatron_offgrpo.config import to_dict
from megatron_offgrpo.data.grading import GradingPool
from megatron_offgrpo.data.tokenisation import load_tokenizer
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.evaluation import statistics
from megatron_offgrpo.evaluation.benchmarks import Question, load_benchmark
from megatron_offgrpo.evaluation.generation import (
    BackendName,
    Precision,
    Request,
    SamplingSettings,
    choose_backend,
    encode_prompt,
    open_backend,
    seed_of,
    stop_token_ids,
)
from megatron_offgrpo.progress import progress, say

SAMPLES, GRADED, METRICS = "samples.jsonl", "graded.jsonl", "metrics.json"
GRADING_CHUNK = 64
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.bin")


@dataclass(frozen=True)
class EvaluationConfig:
    """One model on one benchmark."""

    model: Path
    """Hugging Face folder."""
    benchmark: Path
    """File of `problem`, `answer`, optional `id` records; see `load_benchmark`."""
    output: Path
    samples: int = 4
    """Samples per problem (k of avg@k)."""
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 32768
    seed: int = 0
    system: str | None = None
    """System message of the chat template; None sends none."""
    backend: Literal["auto", "vllm", "hf"] = "auto"
    precision: Precision = "auto"
    """auto: fp32 without a GPU, bf16 on one."""
    tensor_parallel: int = 1
    grading_processes: int | None = None
    """None: one for each CPU."""
    grading_seconds: float = 5.0
    force: bool = False
    """Evaluate again although OUTPUT holds the same evaluation."""


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Samples, grades and summarises; returns what `metrics.json` holds. An equal evaluation on disk is reused.

    Raises:
        ConfigError, DataError: a setting, the model folder or the benchmark is wrong, or OUTPUT is something else.
    """
    if config.samples < 1:
        raise ConfigError("must be at least 1", where="samples", got=config.samples)
    if not (config.model / "config.json").is_file():
        raise DataError("no Hugging Face model here", where=str(config.model), expected="a folder with config.json")
    questions = load_benchmark(config.benchmark)
    tokenizer = load_tokenizer(config.model)
    settings = SamplingSettings(
        config.temperature, config.top_p, config.max_tokens, stop_token_ids(config.model, tokenizer)
    )
    backend = choose_backend(config.backend)
    manifest = _manifest(config, settings, backend, len(questions))
    reused = _finished(config.output, manifest)
    if reused is not None and not config.force:
        say(f"{config.output}: reused, nothing it was made from has changed")
        return reused
    say(f"evaluating {config.model} on {config.benchmark} with {backend}")
    with atomic_folder(config.output) as folder:
        start = time.monotonic()
        samples = _sample(config, settings, backend, questions, tokenizer)
        sampled = time.monotonic()
        _write_jsonl(folder / SAMPLES, samples)
        graded = _grade(config, questions, samples)
        _write_jsonl(folder / GRADED, graded)
        metrics = {
            **summarise(graded, config.seed),
            "backend": backend,
            "sampling_seconds": sampled - start,
            "grading_seconds": time.monotonic() - sampled,
        }
        write_json_atomically(folder / METRICS, metrics)
        write_manifest(folder, manifest)
    return metrics


def _manifest(config: EvaluationConfig, settings: SamplingSettings, backend: BackendName, problems: int) -> Manifest:
    files = [path for pattern in MODEL_FILES for path in config.model.glob(pattern)]
    inputs = {"model": fingerprint_of_files(files), "benchmark": fingerprint_of_file(config.benchmark)}
    meaning = [asdict(settings), config.samples, config.seed, config.system, backend, config.precision]
    counts = {"problems": problems, "samples": problems * config.samples}
    values = {name: str(value) if isinstance(value, Path) else value for name, value in to_dict(config).items()}
    return Manifest("evaluation", fingerprint_of(inputs, meaning), inputs, counts, values)


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


def _sample(
    config: EvaluationConfig,
    settings: SamplingSettings,
    backend_name: BackendName,
    questions: list[Question],
    tokenizer: Any,
) -> list[dict[str, Any]]:
    """One record a sample, in the order of the benchmark."""
    wanted = [(question, sample) for question in questions for sample in range(config.samples)]
    prompts = {question.problem_id: encode_prompt(tokenizer, question.problem, config.system) for question in questions}
    requests = [
        Request(prompts[question.problem_id], seed_of(config.seed, question.problem_id, sample))
        for question, sample in wanted
    ]
    records: list[dict[str, Any]] = [{} for _ in wanted]
    with (
        open_backend(backend_name, config.model, config.precision, config.tensor_parallel) as backend,
        progress("sampling", len(requests)) as advance,
    ):
        start, tokens = time.monotonic(), 0
        for index, completion in backend.generate(requests, settings):
            question, sample = wanted[index]
            tokens += len(completion.token_ids)
            records[index] = {
                "problem_id": question.problem_id,
                "sample_id": sample,
                "text": tokenizer.decode(completion.token_ids, skip_special_tokens=True),
                "tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
                "seed": requests[index].seed,
            }
            advance(1, f"{tokens / (time.monotonic() - start):.0f} tokens/s")
    return records


def _grade(config: EvaluationConfig, questions: list[Question], samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_id = {question.problem_id: question for question in questions}
    graded = []
    with (
        GradingPool(config.grading_processes, config.grading_seconds) as pool,
        progress("grading", len(samples)) as advance,
    ):
        for start in range(0, len(samples), GRADING_CHUNK):
            chunk = samples[start : start + GRADING_CHUNK]
            grades = pool.grade([(by_id[sample["problem_id"]].answer, sample["text"]) for sample in chunk])
            for sample, grade in zip(chunk, grades, strict=True):
                question = by_id[sample["problem_id"]]
                asked = {"problem": question.problem, "answer": question.answer}
                verdict = {"reward": grade.reward, "status": grade.status, "extracted": grade.extracted}
                graded.append({**sample, **asked, **verdict})
            advance(len(chunk))
    return graded


def summarise(graded: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Accuracy with both intervals, pass@k, lengths, and counts of what went wrong."""
    correct_PK = correctness(graded)
    num_samples = correct_PK.shape[1]
    powers = [2**exponent for exponent in range(num_samples.bit_length())]
    new_problems = statistics.interval_new_problems(correct_PK, seed)
    statuses = [record["status"] for record in graded]
    return {
        "problems": len(correct_PK),
        "samples_per_problem": num_samples,
        "accuracy": statistics.accuracy(correct_PK),
        "ci95": new_problems,
        "ci95_new_problems": new_problems,
        "ci95_new_samples": statistics.interval_new_samples(correct_PK, seed),
        "pass_at": {str(k): statistics.pass_at(correct_PK, k) for k in sorted({*powers, num_samples})},
        "mean_tokens": float(np.mean([record["tokens"] for record in graded])),
        "truncated_share": float(np.mean([record["finish_reason"] == "length" for record in graded])),
        "statuses": {status: statuses.count(status) for status in sorted(set(statuses))},
    }


def correctness(graded: list[dict[str, Any]]) -> statistics.CorrectArray:
    """0/1 array [problems, samples per problem], problems in the order of their first record.

    Raises:
        DataError: a problem has more or fewer samples than another.
    """
    rewards: dict[str, list[int]] = {}
    for record in graded:
        rewards.setdefault(record["problem_id"], []).append(record["reward"])
    lengths = {len(values) for values in rewards.values()}
    if len(lengths) != 1:
        raise DataError("problems differ in their number of samples", expected="one number", got=sorted(lengths))
    return np.array(list(rewards.values()), dtype=np.float64)


def read_graded(folder: Path) -> list[dict[str, Any]]:
    """The graded samples of a finished evaluation.

    Raises:
        DataError: no finished evaluation there.
    """
    read_manifest(folder, "evaluation", remedy="run `offgrpo eval` with this output folder")
    with (folder / GRADED).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
