"""`offgrpo generate` and `check-weights`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_offgrpo.cli.options import (
    BackendChoice,
    ChatTemplateKwargs,
    Concurrency,
    Force,
    FrequencyPenalty,
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
    Timeout,
    TopK,
    json_object,
    print_lines,
)


def generate(
    model: Model,
    problems: Annotated[str, typer.Option("--problems", help="File of problems with answers, or a benchmark's name.")],
    output: Annotated[Path, typer.Option("--output", help="Folder for groups.jsonl, which `prepare` takes.")],
    samples: Annotated[int, typer.Option("--samples", min=1, help="Solutions of each problem.")] = 8,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0)] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0)] = 1.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 32768,
    system: System = None,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    chat_template_kwargs: ChatTemplateKwargs = None,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="Files of named benchmarks.")] = None,
    source: Annotated[
        str | None, typer.Option("--source", help="Who wrote them; by default the folder's name.")
    ] = None,
    on_policy: Annotated[bool, typer.Option("--on-policy", help="Mark them as the student's own.")] = False,
    backend: BackendChoice = "auto",
    precision: Precision = "auto",
    tensor_parallel: TensorParallel = 1,
    server_url: ServerUrl = None,
    server_model: ServerModel = None,
    concurrency: Concurrency = 64,
    timeout_seconds: Timeout = 3600.0,
    seed: Seed = 0,
    shard: ShardOption = None,
    force: Force = False,
) -> None:
    """Writes K solutions of each problem with their log-probs, as trajectory groups."""
    from megatron_offgrpo.evaluation.generate import GenerateConfig
    from megatron_offgrpo.evaluation.generate import generate as run
    from megatron_offgrpo.evaluation.generation import BackendConfig, Shaping
    from megatron_offgrpo.evaluation.sample_log import parse_shard

    engine = BackendConfig(
        model, backend, precision, tensor_parallel, server_url, server_model, concurrency, timeout_seconds
    )
    config = GenerateConfig(
        model=model,
        problems=problems,
        output=output,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        seed=seed,
        system=system,
        shaping=Shaping(top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty),
        chat_template_kwargs=json_object("--chat-template-kwargs", chat_template_kwargs),
        data_dir=data_dir,
        source=source,
        on_policy=on_policy,
        backend=engine,
        force=force,
    )
    print_lines([f"{name:<24}{value}" for name, value in run(config, parse_shard(shard)).items()])


def check_weights(
    store: Annotated[Path, typer.Option("--store", help="Folder of the store.")],
    reference: Annotated[Path, typer.Option("--reference", help="Folder of the reference cache.")],
    model: Model,
    output: Annotated[Path, typer.Option("--output", help="JSON file for the result.")],
    vllm: Annotated[bool, typer.Option("--vllm/--no-vllm", help="Also with vLLM.")] = True,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option("--precision", help="Of the back ends.")] = "fp32",
    trajectories: Annotated[int, typer.Option("--trajectories", min=1, help="How many, spread over the store.")] = 32,
    tensor_parallel: TensorParallel = 1,
) -> None:
    """Compares the trainer's log-probs of cached trajectories with those of Hugging Face and vLLM."""
    from megatron_offgrpo.evaluation.generation import BackendConfig
    from megatron_offgrpo.evaluation.weight_check import check_weights as run

    engines = [BackendConfig(model, "hf", precision)]
    if vllm:
        engines.append(BackendConfig(model, "vllm", precision, tensor_parallel))
    result = run(store, reference, model, engines, trajectories, output)
    lines = [f"{result['tokens']} tokens of {result['trajectories']} trajectories"]
    for pair in result["pairs"]:
        lines.append(
            f"{pair['first']} and {pair['second']}: mean difference {pair['mean_abs']:.3g}, "
            f"largest {pair['max_abs']:.3g} nats"
        )
    print_lines(lines)
