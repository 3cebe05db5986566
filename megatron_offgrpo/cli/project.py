"""`offgrpo report`, `doctor`, `recipes` and `quickstart`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_offgrpo.cli.options import Force, Set, print_lines


def report(run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Writes RUN_DIR/report.html, one self-contained file."""
    from megatron_offgrpo.reporting.report import write_report

    print_lines([str(write_report(run_dir))])


def doctor() -> None:
    """Says what is installed, which kernels are active, what is missing and how to get it."""
    from megatron_offgrpo.doctor import lines

    print_lines(lines())


def recipes() -> None:
    """Lists the recipes of runs, and those of data (`offgrpo prepare --recipe`)."""
    from megatron_offgrpo.recipe import list_data_recipes, list_recipes

    found = {**list_recipes(), **list_data_recipes()}
    width = max(map(len, found)) + 2
    print_lines([f"{name:<{width}}{(function.__doc__ or '').splitlines()[0]}" for name, function in found.items()])


def quickstart(
    set: Set = None,
    force: Force = False,
    backend: Annotated[Literal["auto", "vllm", "hf"], typer.Option("--backend")] = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Of data, plan and sampling.")] = 0,
    output: Annotated[Path, typer.Option("--output", help="Folder of the run.")] = Path("runs/quickstart"),
) -> None:
    """The whole chain on synthetic word problems: data to report, in minutes on two CPU cores."""
    from megatron_offgrpo.quickstart import run_quickstart

    run_quickstart(output, overrides=tuple(set or ()), force=force, backend=backend, seed=seed)
