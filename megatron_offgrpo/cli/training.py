"""`offgrpo plan`, `reference` and `train`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_offgrpo.cli.options import Force, Recipe, Set, print_lines
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.progress import say

if TYPE_CHECKING:
    from megatron_offgrpo.config import RunConfig
    from megatron_offgrpo.planning.plan import Plan


def plan(
    recipe: Recipe,
    set: Set = None,
    hardware: Annotated[
        str | None, typer.Option("--hardware", help="COUNTxCARD, e.g. 8xH100; by default layout.processes GPUs.")
    ] = None,
    efficiency: Annotated[
        float, typer.Option("--efficiency", min=0.01, max=1.0, help="Share of the card's peak rate that is achieved.")
    ] = 0.35,
    price: Annotated[float | None, typer.Option("--price", help="Of one GPU for an hour.")] = None,
    assume: Annotated[
        str | None,
        typer.Option(
            "--assume", help="GROUPSxTOKENS instead of a store: groups, mean response tokens. Nothing is saved."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fixes steps, packs and token weights of the whole run, and prints what it will take.

    With --hardware and no store yet, what depends on the model alone: memory and whether it fits.
    """
    from megatron_offgrpo.planning.hardware import Hardware
    from megatron_offgrpo.recipe import load_recipe
    from megatron_offgrpo.reporting import plan_summary

    run = load_recipe(recipe, set or ())
    machine = plan_summary.Machine(run.layout.processes, price=price)
    if hardware is not None:
        machine = plan_summary.Machine.of(Hardware.parse(hardware), efficiency=efficiency, price=price)
    made = _make_plan(run, assume, needs_store=hardware is None)
    facts = plan_summary.plan_facts(made, run, machine)
    print_lines([dumps(facts)] if json else plan_summary.fact_lines(facts))
    plan_summary.require_fit(facts)


def _make_plan(run: RunConfig, assume: str | None, *, needs_store: bool) -> Plan | None:
    """The plan of the recipe's store, saved; of assumed groups, not saved; or None without either."""
    from megatron_offgrpo.data.store import TrajectoryStore
    from megatron_offgrpo.data.vocabulary import require_known_ids
    from megatron_offgrpo.planning.assumed import AssumedGroups
    from megatron_offgrpo.planning.plan import build_plan
    from megatron_offgrpo.planning.plan_files import save_plan

    if assume is not None:
        size, longest = run.plan.trajectories_per_group or 8, run.objective.max_response_tokens
        return build_plan(AssumedGroups.parse(assume, size=size, max_tokens=longest), run.plan, run.objective)
    if not needs_store and not Path(run.paths.store).exists():
        say(f"no store at {run.paths.store}: steps, hours and cost are left out; --assume GROUPSxTOKENS estimates them")
        return None
    store = TrajectoryStore.open(run.paths.store)
    require_known_ids(store.largest_id, *_vocabulary(run), where=run.paths.store)
    made = build_plan(store, run.plan, run.objective)
    save_plan(made, run.paths.plan)
    return made


def _vocabulary(run: RunConfig) -> tuple[int | None, str]:
    """Size of the vocabulary and who says so: config.json, else the checkpoint; None where neither is there."""
    from megatron_offgrpo.data.vocabulary import vocabulary_of
    from megatron_offgrpo.model.hf_config import ARCHITECTURE
    from megatron_offgrpo.training.checkpoint_folder import TRACKER, require_latest

    paths = run.paths
    if (Path(paths.hf_model) / "config.json").exists():
        return vocabulary_of(paths.hf_model), paths.hf_model
    if not (Path(paths.megatron) / TRACKER).exists():
        return None, paths.hf_model
    _, manifest = require_latest(paths.megatron)
    return manifest.counts.get(ARCHITECTURE, {}).get("vocab_size"), paths.megatron


def reference(recipe: Recipe, set: Set = None, force: Force = False) -> None:
    """Computes the reference log-probs of every trajectory, once."""

    def work(run: Any, place: Any) -> None:
        from megatron_offgrpo.training.reference import compute_reference

        compute_reference(run, place, force=force)

    _on_ranks(recipe, set, work)


def train(
    recipe: Recipe,
    set: Set = None,
    force: Force = False,
    reshard: Annotated[
        bool,
        typer.Option("--reshard", help="Do not train: make the newest checkpoint loadable in any layout, and exit."),
    ] = False,
) -> None:
    """Trains by the plan; goes on from the newest checkpoint. SIGTERM or SIGUSR1 saves and exits with status 0."""
    if force and reshard:
        raise ConfigError("--force deletes the checkpoint that --reshard would read", where="offgrpo train")

    def work(run: Any, place: Any) -> None:
        if reshard:
            from megatron_offgrpo.training.reshard import reshard as reshard_newest

            reshard_newest(run, place)
        else:
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
    place = runtime.start(run.layout, seed=run.seed, fault_seconds=run.fault.timeout_seconds)
    work(run, place)
    runtime.stop()
