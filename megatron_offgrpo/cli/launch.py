"""`offgrpo chain`, `launch`, `jobs` and `check-node`."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_offgrpo.cli.options import Recipe, Set, print_lines

Input = Annotated[
    list[str] | None, typer.Option("--input", help="Raw solutions for `prepare`; repeat for several; none: no prepare.")
]
Benchmark = Annotated[str | None, typer.Option("--benchmark", help="Problems to evaluate on; none: no evaluation.")]
Steps = Annotated[str | None, typer.Option("--steps", help="Only these, e.g. train,export; the rest was done before.")]
PrepareShards = Annotated[int, typer.Option("--prepare-shards", min=1)]
EvalShards = Annotated[int, typer.Option("--eval-shards", min=1)]
PrepareArguments = Annotated[str, typer.Option("--prepare-args", help="Further arguments of prepare, in one string.")]
EvalArguments = Annotated[str, typer.Option("--eval-args", help="Further arguments of eval, in one string.")]
ExportArguments = Annotated[str, typer.Option("--export-args", help="Of convert megatron-to-hf, e.g. '--dtype fp32'.")]


def chain(
    recipe: Recipe,
    set: Set = None,
    input: Input = None,
    benchmark: Benchmark = None,
    prepare_shards: PrepareShards = 1,
    eval_shards: EvalShards = 1,
    prepare_args: PrepareArguments = "",
    eval_args: EvalArguments = "",
    export_args: ExportArguments = "",
    steps: Steps = None,
    format: Annotated[
        Literal["text", "shell", "json"], typer.Option("--format", help="shell: for slurm/pipeline.sh.")
    ] = "text",
) -> None:
    """Prints the commands of a recipe in order, from raw solutions to the report; runs nothing."""
    from megatron_offgrpo.launch.chain import ChainOptions, chain_of, to_json
    from megatron_offgrpo.recipe import load_recipe

    options = ChainOptions(
        inputs=tuple(input or ()),
        benchmark=benchmark,
        prepare_shards=prepare_shards,
        eval_shards=eval_shards,
        prepare_arguments=tuple(shlex.split(prepare_args)),
        eval_arguments=tuple(shlex.split(eval_args)),
        export_arguments=tuple(shlex.split(export_args)),
        steps=tuple(steps.split(",")) if steps else (),
    )
    made = chain_of(recipe, set or (), load_recipe(recipe, set or ()), options)
    if format == "json":
        print_lines([to_json(made)])
    elif format == "shell":
        fields = [(s.name, s.script, str(s.shards), ":".join(s.needs) or "-", shlex.join(s.arguments)) for s in made]
        print_lines(["\t".join(line) for line in fields])
    else:
        print_lines([f"{s.name:<16}{shlex.join(('offgrpo', *s.arguments))}{_shards(s.shards)}" for s in made])


def _shards(number: int) -> str:
    return f" --shard I/{number}, I = 0..{number - 1}" if number else ""


def check_node(
    folder: Annotated[Path, typer.Argument(help="Folder on storage that all nodes share.")],
    table: Annotated[
        str | None, typer.Option("--table", help="Print the verdict on these nodes (a,b,c); 1 if one is bad.")
    ] = None,
) -> None:
    """Tests the node it runs on (one task per node under srun; see slurm/check.sbatch): devices, network, storage."""
    from megatron_offgrpo import node_check

    if table is None:
        node_check.check_this_node(folder)
        return
    results = node_check.read_results(folder, table.split(","))
    print_lines(node_check.table_lines(results))
    raise typer.Exit(int(any(result.reasons for result in results)))


def launch(
    recipe: Recipe,
    executor: Annotated[Literal["local", "torchrun", "slurm"], typer.Option("--executor")],
    set: Set = None,
    input: Input = None,
    benchmark: Benchmark = None,
    prepare_shards: PrepareShards = 1,
    eval_shards: EvalShards = 1,
    prepare_args: PrepareArguments = "",
    eval_args: EvalArguments = "",
    export_args: ExportArguments = "",
    steps: Steps = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Of reference and train.")] = 1,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=0, help="And ranks per node.")] = 0,
    account: Annotated[str | None, typer.Option("--account")] = None,
    partition: Annotated[str | None, typer.Option("--partition")] = None,
    container_image: Annotated[str | None, typer.Option("--container-image", help="For pyxis/enroot.")] = None,
    mounts: Annotated[list[str] | None, typer.Option("--mounts", help="FROM:TO; may be repeated.")] = None,
    time: Annotated[
        str, typer.Option("--time", help="Limit of one job; a longer run continues in another.")
    ] = "24:00:00",
    env: Annotated[list[str] | None, typer.Option("--env", help="NAME=VALUE for the jobs; may be repeated.")] = None,
    sbatch: Annotated[list[str] | None, typer.Option("--sbatch", help="Any option: NAME=VALUE, e.g. qos=high.")] = None,
    ssh: Annotated[str | None, typer.Option("--ssh", help="user@host[:port] of a login node.")] = None,
    identity: Annotated[str | None, typer.Option("--identity", help="File of the SSH key.")] = None,
    job_dir: Annotated[
        str | None, typer.Option("--job-dir", help="With --ssh: folder for scripts and logs there.")
    ] = None,
    home: Annotated[str | None, typer.Option("--home", help="This checkout where the jobs run.")] = None,
    workdir: Annotated[str | None, typer.Option("--workdir", help="Where the commands run; by default here.")] = None,
    python: Annotated[
        str | None, typer.Option("--python", help="Of the jobs; by default HOME/.venv/bin/python.")
    ] = None,
    dryrun: Annotated[bool, typer.Option("--dryrun", help="Print the scripts; start nothing.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Slurm: do not wait.")] = False,
    poll_seconds: Annotated[float, typer.Option("--poll-seconds", min=0.5)] = 15.0,
) -> None:
    """Runs the chain of a recipe with NeMo-Run: on this machine, under torchrun, or on Slurm; waits for its end."""
    given = {name: value for name, value in locals().items() if value is not None}
    from megatron_offgrpo.launch import command

    lines, status = command.launch(given)
    print_lines(lines)
    raise typer.Exit(status)


def jobs(
    action: Annotated[Literal["status", "logs", "cancel"], typer.Argument()],
    experiment: Annotated[str, typer.Argument(help="The id that `offgrpo launch` printed.")],
    task: Annotated[str | None, typer.Argument(help="One task; without it, all.")] = None,
    workdir: Annotated[str | None, typer.Option("--workdir", help="As given to launch.")] = None,
) -> None:
    """Status, logs or cancellation of a launched experiment."""
    from megatron_offgrpo.launch import command

    lines, status = command.manage(action, experiment, task, workdir or str(Path.cwd()))
    print_lines(lines)
    raise typer.Exit(status)
