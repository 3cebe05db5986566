"""Command line of the converters: `python -m checkpoints_conversion`, and `offgrpo convert`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_offgrpo.errors import OffgrpoError

app = typer.Typer(
    help="Convert models between Hugging Face and Megatron.", no_args_is_help=True, pretty_exceptions_enable=False
)

Hf = Annotated[Path, typer.Option("--hf", help="Hugging Face model folder: config, tokenizer, safetensors.")]
Megatron = Annotated[
    Path, typer.Option("--megatron", help="Megatron checkpoint folder, the one with latest_checkpointed_iteration.txt.")
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="bf16, fp16 or fp32; by default each tensor keeps its own.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Iteration = Annotated[int | None, typer.Option("--iteration", help="Which one; by default the latest.")]


@app.command("plan")
def plan_command(hf: Hf, dtype: Dtype = None) -> None:
    """Says what a conversion would move, or why it cannot; writes nothing."""
    from checkpoints_conversion.apply import parse_dtype
    from checkpoints_conversion.planning import plan

    typer.echo(plan(hf, one_dtype=parse_dtype(dtype) is not None).describe())


@app.command("hf-to-megatron")
def hf_to_megatron_command(hf: Hf, megatron: Megatron, dtype: Dtype = None, overwrite: Overwrite = False) -> None:
    """Writes a Hugging Face model as a torch_dist checkpoint that any parallel layout loads."""
    from checkpoints_conversion.apply import hf_to_megatron

    manifest = hf_to_megatron(hf, megatron, dtype=dtype, overwrite=overwrite)
    typer.echo(f"{megatron}: {manifest.counts['parameters']:,} parameters, weights {manifest.fingerprint}")


@app.command("megatron-to-hf")
def megatron_to_hf_command(
    hf: Annotated[
        Path,
        typer.Option("--hf", help="The model it began from: config, generation config and tokenizer come from it."),
    ],
    megatron: Megatron,
    output: Annotated[Path, typer.Option("--output", help="Folder to write.")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="bf16, fp16 or fp32; fp32 takes the optimizer's master weights.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Size of a weights file.")] = "5GB",
    iteration: Iteration = None,
    overwrite: Overwrite = False,
) -> None:
    """Writes a Megatron checkpoint as a Hugging Face folder."""
    from checkpoints_conversion.apply import megatron_to_hf

    manifest = megatron_to_hf(
        megatron,
        hf,
        output,
        dtype=dtype,
        max_shard_size=max_shard_size,
        iteration=iteration,
        overwrite=overwrite,
    )
    typer.echo(f"{output}: {manifest.counts['parameters']:,} parameters, weights {manifest.fingerprint}")


@app.command("verify")
def verify_command(
    hf: Hf,
    megatron: Megatron,
    iteration: Iteration = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text for the logits; by default random ids.")] = None,
    logits: Annotated[
        bool, typer.Option("--logits/--no-logits", help="Also compare logits; each model must fit in memory in fp32.")
    ] = True,
) -> None:
    """Compares every tensor bit for bit, then the logits; exits 1 where they differ."""
    from checkpoints_conversion.verification import verify

    result = verify(hf, megatron, iteration=iteration, prompt=prompt, compare_logits=logits)
    typer.echo(result.describe())
    if not result.ok:
        raise typer.Exit(1)


def main() -> None:
    """Runs the command; a user's mistake is one line on standard error and exit status 1."""
    try:
        app(prog_name="python -m checkpoints_conversion")
    except OffgrpoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
