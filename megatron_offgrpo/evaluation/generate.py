"""`offgrpo generate`: K solutions of each problem with their log-probs, as trajectory groups for `offgrpo prepare`.

OUTPUT holds `groups.jsonl` and `manifest.json`. While it is being made, finished samples are in `OUTPUT.parts/`.

The log-probs are log p(token | tokens before) in natural log, before temperature and top-p, as they are computed for
the student and the reference (mu_t in docs/objective.md); that of an end token stands last where it is the
store's end of turn. They belong to token ids, and the store makes its ids anew from the text. A sample whose text does
not give the ids that were sampled keeps its text and loses its log-probs, with the reason beside it and a count in the
manifest.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_offgrpo.artifacts import (
    MANIFEST,
    Manifest,
    atomic_folder,
    fingerprint_of,
    fingerprint_of_file,
    read_manifest,
    write_manifest,
)
from megatron_offgrpo.config_values import to_dict
from megatron_offgrpo.data.chat import ChatFormat, chat_format, decode, encode
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.evaluation.benchmarks import Question, find_benchmark
from megatron_offgrpo.evaluation.generation import (
    HF_BATCH,
    BackendConfig,
    Completion,
    SamplingSettings,
    Shaping,
    choose_backend,
    stop_token_ids,
)
from megatron_offgrpo.evaluation.json_lines import json_line
from megatron_offgrpo.evaluation.prompts import load_prompt_tokenizer, prompt_ids, prompt_text, require_known_prompts
from megatron_offgrpo.evaluation.sample_log import SampleLogs, Shard, remove_parts
from megatron_offgrpo.evaluation.sampling import LazyBackend, SamplingRun, draw_samples
from megatron_offgrpo.evaluation.task import model_fingerprint, num_samples, plain
from megatron_offgrpo.progress import say
from megatron_offgrpo.ranges import Count, NonNegative, Ranged, Seed, Share

GROUPS = "groups.jsonl"


@dataclass(frozen=True)
class GenerateConfig(Ranged):
    """K solutions of each problem of a file."""

    model: Path
    """Hugging Face folder of the generator."""
    problems: Path | str
    """File of problems with answers, or a benchmark's name; see `find_benchmark`."""
    output: Path
    samples: Count = 8
    """K."""
    temperature: NonNegative = 1.0
    top_p: Share = 1.0
    max_tokens: Count = 32768
    seed: Seed = 0
    system: str | None = None
    """System message of the chat template; None sends none."""
    shaping: Shaping = field(default_factory=Shaping)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template; see `chat_format`."""
    data_dir: Path | None = None
    source: str | None = None
    """Who wrote the solutions, as the groups will say; None takes the name of the model's folder."""
    on_policy: bool = False
    """Mark the solutions as the student's own rollouts."""
    backend: BackendConfig | None = None
    """None: vLLM where it is installed, else Hugging Face, with the model above."""
    force: bool = False
    """Write the groups again although OUTPUT holds them."""


def generate(config: GenerateConfig, shard: Shard | None = None) -> dict[str, Any]:
    """Draws the solutions and writes the groups, or draws one shard's share; returns the manifest's counts.

    Raises:
        ConfigError, DataError: a setting, the model folder or the problems are wrong, or OUTPUT is something else.
        GenerationError: the back end failed; what it had finished is taken up by the next call.
    """
    config = replace(config, samples=num_samples(config.samples, config.temperature))
    engine = config.backend or BackendConfig(config.model)
    backend = choose_backend(engine.backend)
    tokenizer = load_prompt_tokenizer(config.model, "chat")
    chat = chat_format(tokenizer, config.chat_template_kwargs)
    for remark in chat.remarks:
        say(f"{config.model}: {remark}")
    config = replace(config, chat_template_kwargs=dict(chat.variables))
    stop = stop_token_ids(config.model, tokenizer)
    settings = SamplingSettings(
        config.temperature, config.top_p, config.max_tokens, stop, logprobs=True, shaping=config.shaping
    )
    questions = find_benchmark(str(config.problems), config.data_dir)
    texts = {
        one.problem_id: prompt_text(tokenizer, one.problem, config.system, "chat", chat.variables) for one in questions
    }
    prompts = {name: prompt_ids(tokenizer, text, "chat") for name, text in texts.items()}
    inputs = {
        "model": model_fingerprint(config.model),
        "problems": fingerprint_of([asdict(question) for question in questions]),
        "prompts": fingerprint_of(list(prompts.items())),
    }
    meaning = [asdict(settings), config.seed, config.samples, config.system, backend, engine.precision]
    meaning.append(engine.server_model)  # not the server's address: after a restart it may be another one
    request = fingerprint_of(inputs, meaning)
    found = _finished(config, request)
    if found is not None and not config.force:
        say(f"{config.output}: reused, nothing it was made from has changed")
        return found
    require_known_prompts(prompts, stop, config.model)
    parts = config.output.absolute().with_name(config.output.name + ".parts") / request
    run = SamplingRun(prompts, config.samples, config.seed, settings, HF_BATCH if backend == "hf" else None, parts)
    say(f"generating {config.samples} solutions of {len(questions)} problems with {config.model} on {backend}")
    with LazyBackend(engine) as lazy:
        logs = draw_samples(run, lazy, lambda key, done: describe(done, chat, texts[key[0]], stop), shard)
    if shard is not None:
        say(f"{parts}: {len(logs)} of {len(run.all_keys())} samples of all shards are there")
        return {"samples": len(logs)}
    return _write(config, questions, run, logs, inputs, request)


def describe(done: Completion, chat: ChatFormat, prompt: str, stop: Sequence[int]) -> dict[str, Any]:
    """Text of a completion, and its log-probs where the text behind its prompt gives the sampled ids again.

    Returns:
        `text`, `logprobs` (None where dropped) and `dropped` (why; None where kept).
    """
    if done.text is not None or done.logprobs is None:
        raise DataError("no token ids or log-probs", where="server", expected="a server that returns both")
    body, logprobs = list(done.without_end(stop)), list(done.logprobs)
    own_end = len(body) < len(done.token_ids) and done.token_ids[-1] == chat.end
    (before,) = encode(chat.tokenizer, [prompt])
    text = decode(chat.tokenizer, before, body)
    # A tokenizer that puts a space before every section of a text puts one there where the response has it too.
    for one in (text, text.removeprefix(" ")):
        if chat.response_ids([prompt], [one]) == [body]:
            kept = logprobs if own_end else logprobs[: len(body)]
            return {"text": one, "logprobs": [min(value, 0.0) for value in kept], "dropped": None}
    # As many tokens would not do: each log-prob is that of one id.
    return {"text": text, "logprobs": None, "dropped": "the text gives other token ids"}


def _finished(config: GenerateConfig, request: str) -> dict[str, Any] | None:
    output = config.output
    if not output.exists():
        return None
    if not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST).is_file()):
        raise ConfigError("would overwrite something else", where=str(output), remedy="choose another output folder")
    if not (output / MANIFEST).is_file():
        return None
    manifest = read_manifest(output, "groups", remedy="choose another output folder")
    same = manifest.inputs.get("request") == request and manifest.counts.get("source") == _source(config)
    return manifest.counts if same and manifest.counts.get("on_policy") == config.on_policy else None


def _source(config: GenerateConfig) -> str:
    return config.source or config.model.absolute().name


def _write(
    config: GenerateConfig,
    questions: list[Question],
    run: SamplingRun,
    logs: SampleLogs,
    inputs: dict[str, str],
    request: str,
) -> dict[str, Any]:
    counts: Counter[str] = Counter({"groups": len(questions), "samples": len(run.all_keys())})
    dropped: Counter[str] = Counter()
    with atomic_folder(config.output) as folder:
        with (folder / GROUPS).open("w", encoding="utf-8") as file:
            for question in questions:
                samples = [logs.read((question.problem_id, k)) for k in range(config.samples)]
                for sample in samples:
                    counts["tokens"] += sample["tokens"]
                    counts["truncated"] += sample["finish_reason"] == "length"
                    counts["empty"] += not sample["text"].strip()
                    if sample["dropped"]:
                        dropped[sample["dropped"]] += 1
                file.write(json_line(_group(config, question, samples)))
        facts = {
            **counts,
            "logprobs_dropped": dict(dropped),
            "source": _source(config),
            "on_policy": config.on_policy,
        }
        fingerprint = fingerprint_of(request, fingerprint_of_file(folder / GROUPS))
        manifest = Manifest("groups", fingerprint, {**inputs, "request": request}, facts, plain(to_dict(config)))
        write_manifest(folder, manifest)
    remove_parts(run.parts)
    return facts


def _group(config: GenerateConfig, question: Question, samples: list[dict[str, Any]]) -> dict[str, Any]:
    group: dict[str, Any] = {
        "group_id": question.problem_id,
        "problem": question.problem,
        "answer": question.answer,
        "trajectories": [
            {
                "text": sample["text"],
                "logprobs": sample["logprobs"],
                "source": _source(config),
                "on_policy": config.on_policy,
                "sample_id": f"{question.problem_id}#{sample['sample_id']}",
                "seed": sample["seed"],
                "finish_reason": sample["finish_reason"],
                "logprobs_dropped": sample["dropped"],
            }
            for sample in samples
        ],
    }
    return group if config.system is None else group | {"system": config.system}
