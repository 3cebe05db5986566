"""`offgrpo`: one thin command per stage."""

import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from megatron_offgrpo.errors import OffgrpoError

app = typer.Typer(
    help="Offline GRPO on Megatron-Core: prepare, plan, reference, train, convert, eval, report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Recipe = Annotated[
    str, typer.Argument(help="A function in recipes/ (quickstart, openthinker3_7b, ...) or module:function.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="path=value, e.g. plan.epochs=3; may be repeated.")]
Force = Annotated[bool, typer.Option("--force", help="Do it again although a finished result is there.")]


@app.command()
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
    _print(summary_lines(run(config)))


@app.command()
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
    _print(plan_lines(made, run, num_gpus=num_gpus, tflops_per_gpu=tflops_per_gpu))


@app.command()
def reference(recipe: Recipe, set: Set = None, force: Force = False) -> None:
    """Computes the reference log-probs of every trajectory, once."""

    def work(run: Any, place: Any) -> None:
        from megatron_offgrpo.training.reference import compute_reference

        compute_reference(run, place, force=force)

    _on_ranks(recipe, set, work)


@app.command()
def train(recipe: Recipe, set: Set = None, force: Force = False) -> None:
    """Trains by the plan; goes on from the newest checkpoint. SIGTERM or SIGUSR1 saves and exits with status 0."""

    def work(run: Any, place: Any) -> None:
        from megatron_offgrpo.training.loop import train as train_loop

        train_loop(run, place, force=force)

    _on_ranks(recipe, set, work)


@app.command("eval")
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
    _print([f"{name:<24}{value}" for name, value in metrics.items() if not isinstance(value, dict)])


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Writes RUN_DIR/report.html, one self-contained file."""
    from megatron_offgrpo.reporting.report import write_report

    _print([str(write_report(run_dir))])


@app.command()
def doctor() -> None:
    """Says what is installed, which kernels are active, what is missing and how to get it."""
    from megatron_offgrpo.doctor import lines

    _print(lines())


@app.command()
def recipes() -> None:
    """Lists the recipes."""
    from megatron_offgrpo.recipe import list_recipes

    _print([f"{name:<24}{(function.__doc__ or '').splitlines()[0]}" for name, function in list_recipes().items()])


@app.command()
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


def _print(lines: list[str]) -> None:
    print("\n".join(lines))


def _mount_converters() -> None:
    from checkpoints_conversion.cli import app as converters

    app.add_typer(converters, name="convert")


def main() -> None:
    """Entry point: a user's mistake is one line on standard error and exit status 1."""
    _quiet()
    _mount_converters()
    try:
        app()
    except OffgrpoError as error:
        _fail(error)


def _quiet() -> None:
    """Silences remarks of libraries about themselves that a user can do nothing about."""
    # Transformer Engine and Apex are absent: `offgrpo doctor` says it once.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    # Megatron's use of torch: renamed collectives, and gradients read where the CPU mode looks on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor")


def _fail(error: OffgrpoError) -> NoReturn:
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        # What is wrong for all ranks is said by the first; the launcher ends this one before it repeats it.
        time.sleep(3)
    print(f"{f'rank {rank}: ' if rank else ''}error: {error}", file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        # Other ranks may hang in a collective; leave without waiting for them.
        os._exit(1)
    sys.exit(1)


if __name__ == "__main__":
    main()
