"""The commands of a recipe, from raw solutions to the report, with what each waits for."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_offgrpo.config import RunConfig
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.objective.needs import needs_reference
from megatron_offgrpo.ranges import Count, Ranged

Script = Literal["prepare", "convert", "run", "reference", "train", "eval"]
"""The batch file in slurm/ that runs the step."""
RANKED: tuple[Script, ...] = ("reference", "train")
"""One task per rank; the others are one task."""


@dataclass(frozen=True)
class Step:
    """One command of the chain."""

    name: str
    script: Script
    arguments: tuple[str, ...]
    """Of `offgrpo`; the first is the command."""
    needs: tuple[str, ...] = ()
    """Steps that must have succeeded before."""
    shards: int = 0
    """With N > 0, N tasks run the command with `--shard I/N`."""

    @property
    def on_ranks(self) -> bool:
        """True if the command wants one task per rank."""
        return self.script in RANKED


@dataclass(frozen=True)
class ChainOptions(Ranged, section="--"):
    """What the recipe does not say."""

    inputs: tuple[str, ...] = ()
    """Raw solutions; none leaves out `prepare`."""
    benchmark: str | None = None
    """Problems to evaluate on; None leaves out both evaluations."""
    prepare_shards: Count = 1
    eval_shards: Count = 1
    prepare_arguments: tuple[str, ...] = ()
    """Further arguments of `offgrpo prepare`."""
    eval_arguments: tuple[str, ...] = ()
    """Further arguments of `offgrpo eval`."""
    export_arguments: tuple[str, ...] = ()
    """Further arguments of `offgrpo convert megatron-to-hf`, for example --dtype fp32."""
    steps: tuple[str, ...] = ()
    """Only these; the others must have been done before."""


def chain_of(recipe: str, overrides: Sequence[str], run: RunConfig, options: ChainOptions) -> list[Step]:
    """The steps in an order in which each comes after those it needs.

    Raises:
        ConfigError: a path that a step needs is empty, or `options.steps` names an unknown step.
    """
    paths = run.paths
    reads_reference = needs_reference(run.objective)
    for name in ("hf_model", "store", "megatron", "plan", *(("reference",) if reads_reference else ()), "output"):
        if not getattr(paths, name):
            raise ConfigError("this path is empty", where=f"paths.{name}", remedy=f"--set paths.{name}=FOLDER")
    root = Path(paths.output).parent
    exported = root / "final_hf"
    recipe_arguments = (recipe, *(word for setting in overrides for word in ("--set", setting)))
    steps = _prepare(run, options)
    after_prepare = tuple(step.name for step in steps[-1:])
    hf = ("--hf", paths.hf_model)
    steps += [
        Step("convert", "convert", ("convert", "hf-to-megatron", *hf, "--megatron", paths.megatron, "--overwrite")),
        Step("plan", "run", ("plan", *recipe_arguments), after_prepare),
    ]
    before_train: tuple[str, ...] = ("convert", "plan")
    if reads_reference:
        steps.append(Step("reference", "reference", ("reference", *recipe_arguments), before_train))
        before_train = ("reference",)
    checkpoints = str(Path(paths.output) / "checkpoints")
    export = ("convert", "megatron-to-hf", *hf, "--megatron", checkpoints, "--output", str(exported), "--overwrite")
    steps += [
        Step("train", "train", ("train", *recipe_arguments), before_train),
        Step("export", "convert", (*export, *options.export_arguments), ("train",)),
    ]
    evaluations = _evaluations(run, root, exported, options)
    steps += evaluations
    steps.append(
        Step("report", "run", ("report", str(root)), ("export", *(s.name for s in evaluations if not s.shards)))
    )
    return _chosen(steps, options.steps)


def _prepare(run: RunConfig, options: ChainOptions) -> list[Step]:
    if not options.inputs:
        return []
    arguments = (
        "prepare",
        *(word for path in options.inputs for word in ("--input", path)),
        *("--tokenizer", run.paths.hf_model, "--output", run.paths.store),
        *("--trajectories-per-group", str(run.plan.trajectories_per_group or 8)),
        *("--max-response-tokens", str(run.objective.max_response_tokens)),
        *options.prepare_arguments,
    )
    return _sharded(Step("prepare", "prepare", arguments), options.prepare_shards)


def _evaluations(run: RunConfig, root: Path, exported: Path, options: ChainOptions) -> list[Step]:
    if options.benchmark is None:
        return []
    steps = []
    # The model before training needs nothing, but there is no use in it while the data or the recipe are wrong.
    for name, model, needs in (("eval_base", run.paths.hf_model, "plan"), ("eval_final", str(exported), "export")):
        arguments = ("eval", "--model", model, "--benchmark", options.benchmark, "--output", str(root / name))
        steps += _sharded(Step(name, "eval", (*arguments, *options.eval_arguments), (needs,)), options.eval_shards)
    return steps


def _sharded(step: Step, shards: int) -> list[Step]:
    """The step alone, or shards of it before the same command that puts them together."""
    if shards <= 1:
        return [step]
    parts = Step(f"{step.name}_shards", step.script, step.arguments, step.needs, shards)
    return [parts, Step(step.name, step.script, step.arguments, (parts.name,))]


def _chosen(steps: list[Step], names: tuple[str, ...]) -> list[Step]:
    known = [step.name for step in steps]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError("no such step", where="--steps", expected=f"of {', '.join(known)}", got=unknown[0])
    if not names:
        return steps
    # Through a step that is left out, what comes after it still waits for what came before it.
    needs: dict[str, tuple[str, ...]] = {}
    for step in steps:
        kept = [other for need in step.needs for other in ((need,) if need in names else needs[need])]
        needs[step.name] = tuple(dict.fromkeys(kept))
    return [replace(step, needs=needs[step.name]) for step in steps if step.name in names]


def to_json(steps: Sequence[Step]) -> str:
    """One line, read by `from_json` in another process."""
    return json.dumps([asdict(step) for step in steps])


def from_json(text: str) -> list[Step]:
    """The steps written by `to_json`."""
    steps = []
    for raw in json.loads(text):
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in raw.items()}
        steps.append(Step(**fields))
    return steps
