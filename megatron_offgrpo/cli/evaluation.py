"""`offgrpo eval`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_offgrpo.cli.options import Force, print_lines


def evaluate_command(
    model: Annotated[Path, typer.Option("--model", help="Hugging Face folder.")],
    benchmark: Annotated[Path, typer.Option("--benchmark", help="File of problems and answers.")],
    output: Annotated[Path, typer.Option("--output", help="Folder for samples and scores.")],
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples per problem.")] = 4,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0)] = 0.6,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0)] = 0.95,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 32768,
    backend: Annotated[Literal["auto", "vllm", "hf"], typer.Option("--backend")] = "auto",
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel", min=1)] = 1,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    force: Force = False,
) -> None:
    """Samples a model on a benchmark, grades with math-verify, and gives accuracy with its 95 % intervals."""
    from megatron_offgrpo.evaluation.evaluate import EvaluationConfig, evaluate

    metrics = evaluate(
        EvaluationConfig(
            model=model,
            benchmark=benchmark,
            output=output,
            samples=samples,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            backend=backend,
            tensor_parallel=tensor_parallel,
            seed=seed,
            force=force,
        )
    )
    print_lines([f"{name:<24}{value}" for name, value in metrics.items() if not isinstance(value, dict)])
