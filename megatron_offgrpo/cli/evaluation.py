"""`offgrpo eval`, `grade` and `compare`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from megatron_offgrpo.cli.options import (
    BackendChoice,
    ChatTemplateKwargs,
    Concurrency,
    Force,
    FrequencyPenalty,
    JudgeModel,
    JudgeUrl,
    MinP,
    Model,
    Precision,
    PresencePenalty,
    RepetitionPenalty,
    Seed,
    ServerModel,
    ServerUrl,
    ShardOption,
    System,
    TensorParallel,
    ThinkTags,
    Timeout,
    TopK,
    json_object,
    print_lines,
)
from megatron_offgrpo.data_config import THINK_TAGS
from megatron_offgrpo.errors import ConfigError

if TYPE_CHECKING:
    from megatron_offgrpo.evaluation.sample_log import Shard
    from megatron_offgrpo.evaluation.task import EvaluationConfig


def evaluate_command(
    model: Model,
    benchmark: Annotated[
        list[str], typer.Option("--benchmark", help="aime24, math500, ... or a file of problems; repeat for several.")
    ],
    output: Annotated[Path, typer.Option("--output", help="Folder for samples and scores; of several, OUTPUT/NAME.")],
    preset: Annotated[
        Literal["krafton"] | None, typer.Option("--preset", help="krafton: 64 samples, T 0.6, top-p 0.95, 32k tokens.")
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Samples per problem; 4.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0.0, help="0.6")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0, help="0.95")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="32768")] = None,
    template: Annotated[
        Literal["chat", "qwen-math", "simplerl", "prime", "none"], typer.Option("--template", help="chat: the model's.")
    ] = "chat",
    system: System = None,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    chat_template_kwargs: ChatTemplateKwargs = None,
    think_tags: ThinkTags = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Files of named benchmarks; without it they come from the hub.")
    ] = None,
    leave_out_unreadable: Annotated[
        bool, typer.Option("--leave-out-unreadable", help="Leave out problems with unreadable reference answers.")
    ] = False,
    store: Annotated[Path | None, typer.Option("--store", help="Training store: its overlap is reported.")] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(
            "--checkpoints", help="RUN/train/checkpoints: evaluate each, in OUTPUT/iter_N; MODEL is its base."
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="With --checkpoints: wait for more, until the run's last step.")
    ] = False,
    backend: BackendChoice = "auto",
    precision: Precision = "auto",
    tensor_parallel: TensorParallel = 1,
    server_url: ServerUrl = None,
    server_model: ServerModel = None,
    concurrency: Concurrency = 64,
    timeout_seconds: Timeout = 3600.0,
    judge: JudgeUrl = None,
    judge_model: JudgeModel = None,
    seed: Seed = 0,
    shard: ShardOption = None,
    force: Force = False,
) -> None:
    """Samples a model on benchmarks, grades with math-verify, and gives accuracy with its 95 % intervals."""
    from megatron_offgrpo.evaluation.generation import BackendConfig, Shaping
    from megatron_offgrpo.evaluation.sample_log import parse_shard
    from megatron_offgrpo.evaluation.task import PRESETS, EvaluationConfig

    engine = BackendConfig(
        model, backend, precision, tensor_parallel, server_url, server_model, concurrency, timeout_seconds
    )
    _check_benchmarks(benchmark)
    _check_checkpoints(checkpoints, follow=follow, shard=shard, backend=backend)
    given = {"samples": samples, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
    settings: dict[str, Any] = PRESETS[preset] if preset else {}
    settings = settings | {name: value for name, value in given.items() if value is not None}
    config = EvaluationConfig(
        model=model,
        benchmark=benchmark[0],
        output=output,
        template=template,
        system=system,
        shaping=Shaping(top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty),
        chat_template_kwargs=json_object("--chat-template-kwargs", chat_template_kwargs),
        think_tags=tuple(think_tags or THINK_TAGS),
        data_dir=data_dir,
        leave_out_unreadable=leave_out_unreadable,
        store=store,
        backend=engine,
        judge=judge,
        judge_model=judge_model,
        seed=seed,
        force=force,
        **settings,
    )
    if checkpoints is None:
        _evaluate_model(config, benchmark, parse_shard(shard))
    else:
        _evaluate_checkpoints(config, benchmark, checkpoints, follow=follow)


def _evaluate_checkpoints(
    config: "EvaluationConfig", benchmarks: list[str], checkpoints: Path, *, follow: bool
) -> None:
    """Each exported checkpoint in the place of the model, into OUTPUT/iter_N."""
    from megatron_offgrpo.evaluation.checkpoints import exported

    for name, folder in exported(checkpoints, config.model, config.output, follow=follow):
        print_lines([f"{name}:"])
        engine, output = replace(config.engine, model=folder), config.output / name
        _evaluate_model(replace(config, model=folder, backend=engine, output=output), benchmarks, None)


def _evaluate_model(config: "EvaluationConfig", benchmarks: list[str], share: "Shard | None") -> None:
    """On each benchmark with one engine; of several, into OUTPUT/NAME."""
    from megatron_offgrpo.evaluation.evaluate import evaluate, sample_shard
    from megatron_offgrpo.evaluation.sampling import LazyBackend

    several = len(benchmarks) > 1
    with LazyBackend(config.engine) as lazy:
        for name in benchmarks:
            output = config.output / Path(name).name if several else config.output
            one = replace(config, benchmark=name, output=output)
            if share is not None:
                sample_shard(one, share, lazy)
                continue
            metrics = evaluate(one, lazy)
            print_lines(([f"{name}:"] if several else []) + summary_lines(metrics))


def _check_benchmarks(benchmarks: list[str]) -> None:
    names = [Path(name).name for name in benchmarks]
    if len(set(names)) < len(names):
        got = ", ".join(names)
        raise ConfigError("one output folder for two benchmarks", where="--benchmark", expected="other names", got=got)


def _check_checkpoints(checkpoints: Path | None, *, follow: bool, shard: str | None, backend: str) -> None:
    if checkpoints is None:
        if follow:
            raise ConfigError("nothing to follow", where="--follow", expected="--checkpoints RUN/train/checkpoints")
        return
    for option, given in (("--shard", shard), ("--backend server", backend == "server")):
        if given:
            raise ConfigError("does not go with --checkpoints", where=option, remedy="evaluate one checkpoint with it")


def summary_lines(metrics: dict[str, Any]) -> list[str]:
    """The figures of an evaluation, a line each."""
    from megatron_offgrpo.data.judge import judge_line

    lines = [f"{metrics['problems']} problems x {metrics['samples_per_problem']} samples, by {metrics['backend']}"]
    for title, scores in (("accuracy", metrics), ("strict", metrics["strict"])):
        lines.append(f"{title:<12}{_percent(scores['accuracy'])}{_interval(scores)}")
        lines.append(f"{'  majority':<12}{_percent(scores['majority'])}")
        lines += [f"  pass@{k:<5}{_percent(value)}" for k, value in scores["pass_at"].items() if k != "1"]
    if metrics["minimum_detectable_difference"] is not None:
        points = f"{100 * metrics['minimum_detectable_difference']:.1f}"
        lines.append(f"smaller differences than {points} points between two models are noise, on these very problems")
    shares = ("truncated_share", "no_box_share", "empty_share")
    told = ", ".join(f"{name.removesuffix('_share').replace('_', ' ')} {_percent(metrics[name])}" for name in shares)
    lines.append(f"{metrics['mean_tokens']:.0f} tokens on average; {told}")
    odd = {name: count for name, count in metrics["statuses"].items() if name not in ("ok", "judged", "no_answer")}
    lines += [f"{count} samples graded as {name}" for name, count in odd.items()]
    if metrics.get("judge") is not None:
        lines.append(judge_line(metrics["judge"]))
    if metrics["problems_left_out"]:
        lines.append(f"{metrics['problems_left_out']} problems left out: their reference answers cannot be read")
    if metrics["contamination"]:
        lines.append(f"{metrics['contamination']['overlapping']} problems stand in the training store")
    return lines


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _interval(scores: dict[str, Any]) -> str:
    parts = [
        f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} over {name}"
        for name in ("new problems", "new samples")
        if (interval := scores[f"ci95_{name.replace(' ', '_')}"]) is not None
    ]
    return f", 95 % interval {', '.join(parts)}" if parts else ""


def grade(
    input: Annotated[Path, typer.Option("--input", help="Records: group_id, sample_id, problem, answer, text.")],
    output: Annotated[Path, typer.Option("--output", help="JSON lines: with strict, lenient, extracted, reason.")],
    processes: Annotated[int | None, typer.Option("--processes", min=1, help="One for each CPU.")] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.001, help="CPU seconds for one solution.")] = 5.0,
    prompt_opens_thinking: Annotated[
        bool,
        typer.Option(
            "--prompt-opens-thinking", help="The prompts ended inside a thought, where a line does not say otherwise."
        ),
    ] = False,
    think_tags: ThinkTags = None,
    judge: JudgeUrl = None,
    judge_model: JudgeModel = None,
) -> None:
    """Grades solutions made elsewhere, with math-verify."""
    from megatron_offgrpo.evaluation.grade_file import grade_file

    counts = grade_file(
        input,
        output,
        processes=processes,
        seconds=seconds,
        think_tags=tuple(think_tags or THINK_TAGS),
        prompt_opens_thinking=prompt_opens_thinking,
        judge_url=judge,
        judge_model=judge_model,
    )
    print_lines(
        [
            f"{counts.graded} graded: {counts.lenient} right ({100 * counts.lenient / counts.graded:.1f} %), "
            f"{counts.strict} in the strict form ({100 * counts.strict / counts.graded:.1f} %); "
            f"{counts.rejected} record(s) rejected"
        ]
    )


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of evaluations; the others are compared with the first.")],
    output: Annotated[Path, typer.Option("--output", help="Folder for comparison.csv, .xlsx and .html.")],
) -> None:
    """Compares models that were evaluated on the same problems, and says whether a difference is within noise."""
    from rich.console import Console

    from megatron_offgrpo.reporting.comparison import write_comparison

    tables, sentences = write_comparison(runs, output)
    console = Console()
    for table in tables:
        console.print(table)
    print_lines([*sentences, str(output / "comparison.html")])
