"""`offgrpo plan`, `reference` and `train`."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from megatron_offgrpo.cli.options import Force, Recipe, Set, print_lines


def plan(
    recipe: Recipe,
    set: Set = None,
    tflops_per_gpu: Annotated[
        float | None, typer.Option("--tflops-per-gpu", help="Achieved TFLOP/s of one GPU, for the estimate of hours.")
    ] = None,
    num_gpus: Annotated[int | None, typer.Option("--num-gpus", help="By default layout.processes.")] = None,
) -> None:
    """Fixes steps, packs and token weights of the whole run, and prints what it will take."""
    from megatron_offgrpo.data.store import TrajectoryStore
    from megatron_offgrpo.planning.plan import build_plan, save_plan
    from megatron_offgrpo.recipe import load_recipe
    from megatron_offgrpo.reporting.plan_summary import plan_lines

    run = load_recipe(recipe, set or ())
    made = build_plan(TrajectoryStore.open(run.paths.store), run.plan, run.objective)
    save_plan(made, run.paths.plan)
    print_lines(plan_lines(made, run, num_gpus=num_gpus, tflops_per_gpu=tflops_per_gpu))


def reference(recipe: Recipe, set: Set = None, force: Force = False) -> None:
    """Computes the reference log-probs of every trajectory, once."""

    def work(run: Any, place: Any) -> None:
        from megatron_offgrpo.training.reference import compute_reference

        compute_reference(run, place, force=force)

    _on_ranks(recipe, set, work)


def train(recipe: Recipe, set: Set = None, force: Force = False) -> None:
    """Trains by the plan; goes on from the newest checkpoint. SIGTERM or SIGUSR1 saves and exits with status 0."""

    def work(run: Any, place: Any) -> None:
        from megatron_offgrpo.training.loop import train as train_loop

        train_loop(run, place, force=force)

    _on_ranks(recipe, set, work)


def _on_ranks(recipe: str, overrides: list[str] | None, work: Callable[[Any, Any], None]) -> None:
    """Runs `work` as one rank of a launched command; started plainly, starts the local processes instead."""
    from megatron_offgrpo.parallel import local
    from megatron_offgrpo.recipe import load_recipe

    run = load_recipe(recipe, overrides or ())
    if not local.is_launched() and run.layout.processes > 1:
        run.check_layout(run.layout.processes)
        code = local.run_local([sys.executable, "-m", "megatron_offgrpo.cli", *sys.argv[1:]], run.layout.processes)
        raise typer.Exit(code)
    from megatron_offgrpo.parallel import runtime

    run.check_layout(local.world_size())
    place = runtime.start(run.layout, seed=run.seed)
    work(run, place)
    runtime.stop()
