"""What an evaluation is made of: its configuration, checked, with the questions, prompts and manifest it names."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_offgrpo.artifacts import MANIFEST, Manifest, fingerprint_of, fingerprint_of_files
from megatron_offgrpo.config_values import to_dict
from megatron_offgrpo.data.chat import chat_format
from megatron_offgrpo.data.judge import model_of
from megatron_offgrpo.data.thinking import ThinkTags
from megatron_offgrpo.data_config import THINK_TAGS, GradingSeconds
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.evaluation.benchmarks import Question, find_benchmark
from megatron_offgrpo.evaluation.generation import (
    HF_BATCH,
    BackendConfig,
    SamplingSettings,
    Shaping,
    choose_backend,
    stop_token_ids,
)
from megatron_offgrpo.evaluation.grading import unreadable_golds
from megatron_offgrpo.evaluation.prompts import (
    TemplateName,
    load_prompt_tokenizer,
    prompt_ids,
    prompt_text,
    require_known_prompts,
)
from megatron_offgrpo.evaluation.sampling import SamplingRun
from megatron_offgrpo.progress import say
from megatron_offgrpo.ranges import Count, NonNegative, Ranged, Seed, Share

MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.bin")
PRESETS: dict[str, dict[str, Any]] = {
    "krafton": {"samples": 64, "temperature": 0.6, "top_p": 0.95, "max_tokens": 32768},
}
"""Published sampling settings, by name."""


@dataclass(frozen=True)
class EvaluationConfig(Ranged):
    """One model on one benchmark."""

    model: Path
    """Hugging Face folder."""
    benchmark: Path | str
    """Name of a benchmark, or file of `problem`, `answer`, optional `id` records; see `find_benchmark`."""
    output: Path
    samples: Count = 4
    """Samples per problem (k of avg@k)."""
    temperature: NonNegative = 0.6
    """0 takes the most probable tokens, and one sample."""
    top_p: Share = 0.95
    max_tokens: Count = 32768
    seed: Seed = 0
    system: str | None = None
    """System message of the chat template; None sends none."""
    template: TemplateName = "chat"
    shaping: Shaping = field(default_factory=Shaping)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template; see `chat_format`."""
    think_tags: tuple[str, ...] = THINK_TAGS
    """What parts the thought from the final answer."""
    data_dir: Path | None = None
    """Folder with the files of named benchmarks; None loads them from the hub."""
    leave_out_unreadable: bool = False
    """Leave out problems whose reference answer cannot be read, instead of refusing the benchmark."""
    store: Path | None = None
    """Training store whose problems are compared with those of the benchmark; the overlap is kept with the figures."""
    backend: BackendConfig | None = None
    """None: vLLM where it is installed, else Hugging Face, with the model above."""
    grading_processes: Count | None = None
    """None: one for each CPU."""
    grading_seconds: GradingSeconds = 5.0
    judge: str | None = None
    """`http://HOST:PORT/v1` of a server that is asked about answers which no rule reads; see `Judge`."""
    judge_model: str | None = None
    """Its model; None takes the only one there."""
    force: bool = False
    """Evaluate again although OUTPUT holds the same evaluation."""

    @property
    def engine(self) -> BackendConfig:
        return self.backend or BackendConfig(self.model)


@dataclass(frozen=True)
class Task:
    """A checked configuration with what it names."""

    config: EvaluationConfig
    backend: str
    questions: list[Question]
    left_out: int
    """Problems of the benchmark that are not among the questions."""
    tokenizer: Any
    thinking: dict[str, bool]
    """Problem id -> whether its prompt ends inside a thought."""
    run: SamplingRun
    manifest: Manifest


def make_task(config: EvaluationConfig) -> Task:
    """Checks the configuration and reads all that it names.

    Raises:
        ConfigError, DataError: a setting, the model folder or the benchmark is wrong.
    """
    config = replace(config, samples=num_samples(config.samples, config.temperature))
    tags = ThinkTags(config.think_tags)
    if not (config.model / "config.json").is_file():
        raise DataError("no Hugging Face model here", where=str(config.model), expected="a folder with config.json")
    config = replace(config, judge_model=model_of(config.judge, config.judge_model))
    backend = choose_backend(config.engine.backend)
    tokenizer = load_prompt_tokenizer(config.model, config.template)
    variables = template_variables(tokenizer, config.template, config.chat_template_kwargs)
    config = replace(config, chat_template_kwargs=variables)
    stop = stop_token_ids(config.model, tokenizer)
    settings = SamplingSettings(config.temperature, config.top_p, config.max_tokens, stop, shaping=config.shaping)
    questions = find_benchmark(str(config.benchmark), config.data_dir)
    texts = {
        one.problem_id: prompt_text(tokenizer, one.problem, config.system, config.template, variables)
        for one in questions
    }
    prompts = {name: prompt_ids(tokenizer, text, config.template) for name, text in texts.items()}
    require_known_prompts(prompts, settings.stop_token_ids, config.model)
    thinking = {name: tags.opens(text) for name, text in texts.items()}
    manifest = _manifest(config, settings, backend, questions, prompts)
    run = SamplingRun(
        prompts,
        config.samples,
        config.seed,
        settings,
        HF_BATCH if backend == "hf" else None,
        config.output.absolute().with_name(config.output.name + ".parts") / manifest.fingerprint,
    )
    return Task(config, backend, questions, 0, tokenizer, thinking, run, manifest)


def num_samples(wanted: int, temperature: float) -> int:
    """Samples of each problem: one at temperature 0, where all would be the same.

    Raises:
        ConfigError: fewer than one.
    """
    if temperature == 0 and wanted > 1:
        say(f"temperature 0: one sample of each problem instead of {wanted}, which would all be the same")
        return 1
    return wanted


def template_variables(tokenizer: Any, template: TemplateName, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the chat template is given beside the messages; of another template nothing.

    Raises:
        ConfigError: a variable that the template does not have.
    """
    if template == "chat":
        chat = chat_format(tokenizer, given)
        for remark in chat.remarks:
            say(remark)
        return dict(chat.variables)
    if given:
        raise ConfigError("this template has no variables", where="chat_template_kwargs", got=template)
    return {}


def without_unreadable(task: Task) -> Task:
    """The task with the questions whose reference answers can be read; called before anything is sampled.

    Raises:
        DataError: some cannot, and `leave_out_unreadable` is not set.
    """
    config, questions = task.config, task.questions
    open_ones = [one for one in questions if not one.choices]
    if not open_ones:
        return task
    bad = {
        open_ones[index].problem_id: kind for index, kind in unreadable_golds(one.answer for one in open_ones).items()
    }
    if not bad:
        return task
    shown = [f"{one.problem_id}: {one.answer!r} ({bad[one.problem_id]})" for one in questions if one.problem_id in bad]
    if not config.leave_out_unreadable or len(bad) == len(questions):
        raise DataError(
            f"{len(bad)} of {len(questions)} reference answers cannot be read",
            where=str(config.benchmark),
            got="; ".join(shown[:5]) + ("; ..." if len(shown) > 5 else ""),
            remedy="mend them, or pass --leave-out-unreadable (they are then counted, not scored)",
        )
    say(f"{config.benchmark}: {len(bad)} problem(s) left out, their answers cannot be read: {'; '.join(shown[:5])}")
    kept = [one for one in questions if one.problem_id not in bad]
    run = replace(task.run, prompts={one.problem_id: task.run.prompts[one.problem_id] for one in kept})
    return replace(task, questions=kept, left_out=len(bad), run=run)


def model_fingerprint(folder: Path) -> str:
    """Of the files that make a Hugging Face model."""
    # Not the manifest of an export: it has the command that made it.
    files = (path for pattern in MODEL_FILES for path in folder.glob(pattern))
    return fingerprint_of_files([path for path in files if path.name != MANIFEST])


def _manifest(
    config: EvaluationConfig,
    settings: SamplingSettings,
    backend: str,
    questions: list[Question],
    prompts: Mapping[str, tuple[int, ...]],
) -> Manifest:
    inputs = {
        "model": model_fingerprint(config.model),
        "benchmark": fingerprint_of([asdict(question) for question in questions]),
        "prompts": fingerprint_of(list(prompts.items())),
    }
    engine = config.engine
    # Not the server's address: after a restart it may be another one.
    where = [backend, engine.precision, engine.server_model]
    what = [config.samples, config.seed, config.system, config.template, config.leave_out_unreadable]
    meaning: list[Any] = [asdict(settings), what, where, config.think_tags]
    if config.judge is not None:
        meaning.append(config.judge_model)
    counts = {"problems": len(questions), "samples": len(questions) * config.samples}
    return Manifest("evaluation", fingerprint_of(inputs, meaning), inputs, counts, plain(to_dict(config)))


def plain(value: Any) -> Any:
    """A configuration as JSON-able values: paths as texts."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    return str(value) if isinstance(value, Path) else value
