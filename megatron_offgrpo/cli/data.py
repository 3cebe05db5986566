"""`offgrpo prepare`."""

from typing import Annotated, Literal

import typer

from megatron_offgrpo.cli.options import Force, print_lines


def prepare(
    input: Annotated[
        list[str], typer.Option("--input", help="JSON lines (.jsonl, .jsonl.gz) or Parquet; repeat for several.")
    ],
    tokenizer: Annotated[str, typer.Option("--tokenizer", help="Hugging Face folder with the student's tokenizer.")],
    output: Annotated[str, typer.Option("--output", help="Folder of the store.")],
    label: Annotated[Literal["math-verify", "given", "majority"], typer.Option("--label")] = "math-verify",
    trajectories_per_group: Annotated[int, typer.Option("--trajectories-per-group", min=1)] = 8,
    max_prompt_tokens: Annotated[int, typer.Option("--max-prompt-tokens", min=1)] = 1024,
    max_response_tokens: Annotated[int, typer.Option("--max-response-tokens", min=1)] = 31744,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store made from other inputs.")] = False,
    force: Force = False,
) -> None:
    """Labels, selects and tokenises solutions into a store."""
    from megatron_offgrpo.data.prepare import PrepareConfig, summary_lines
    from megatron_offgrpo.data.prepare import prepare as run

    config = PrepareConfig(
        inputs=tuple(input),
        tokenizer=tokenizer,
        output=output,
        label=label,
        trajectories_per_group=trajectories_per_group,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        overwrite=overwrite,
        force=force,
    )
    print_lines(summary_lines(run(config)))
