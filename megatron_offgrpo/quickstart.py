"""`offgrpo quickstart`: the whole chain, each stage the very code a person would run alone."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_offgrpo.artifacts import (
    MANIFEST,
    fingerprint_of,
    fingerprint_of_file,
    fingerprint_of_files,
    write_json_atomically,
)
from megatron_offgrpo.config import PathsConfig, RunConfig
from megatron_offgrpo.config_values import to_dict
from megatron_offgrpo.data.prepare import PrepareConfig, prepare, summary_lines
from megatron_offgrpo.data.store import TrajectoryStore, tokenizer_fingerprint
from megatron_offgrpo.errors import OffgrpoError
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.planning.plan_files import load_plan, save_plan
from megatron_offgrpo.progress import say
from megatron_offgrpo.recipe import load_recipe
from megatron_offgrpo.reporting.plan_summary import plan_lines

PROBLEMS, SOLUTIONS, HELD_OUT = 320, 16, 200
SAMPLES, TEMPERATURE, TOP_P = 4, 0.6, 0.95
TFLOPS_PER_PROCESS = 0.007
"""What one CPU core achieves on a model of this size, for the printed estimate of time."""
STAGES_FILE = "stages.json"
SUMMARY_FILE = "summary.json"


class Stages:
    """Runs named stages once; one whose inputs have not changed since it last finished is reused."""

    def __init__(self, root: Path, *, force: bool) -> None:
        self.root, self.force = root, force
        self.path = root / STAGES_FILE
        self.done: dict[str, Any] = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}

    def run(self, name: str, command: str, key: object, outputs: Sequence[Path], work: Callable[[], None]) -> None:
        """Runs `work` unless the stage finished before with this key and its outputs are still there."""
        fingerprint = fingerprint_of(name, key)
        reused = self.done.get(name, {}).get("key") == fingerprint and all(path.exists() for path in outputs)
        say(f"== {name}: {command}{'   (reused)' if reused and not self.force else ''}")
        if reused and not self.force:
            return
        started = time.perf_counter()
        work()
        self.done[name] = {"key": fingerprint, "seconds": round(time.perf_counter() - started, 2)}
        write_json_atomically(self.path, self.done)

    def seconds(self) -> dict[str, float]:
        """Duration of each stage when it last ran."""
        return {name: entry["seconds"] for name, entry in self.done.items()}


def run_quickstart(
    root: Path, *, overrides: tuple[str, ...] = (), force: bool = False, backend: str = "auto", seed: int = 0
) -> None:
    """Makes everything from the problems to `report.html` and `summary.json` under `root`."""
    started = time.perf_counter()
    paths = PathsConfig(
        hf_model=str(root / "base_hf"),
        store=str(root / "store"),
        megatron=str(root / "base_megatron"),
        reference=str(root / "reference"),
        plan=str(root / "plan"),
        output=str(root / "train"),
    )
    settings = [f"paths.{name}={value}" for name, value in to_dict(paths).items()] + [f"plan.seed={seed}", *overrides]
    run = load_recipe("quickstart", settings)
    root.mkdir(parents=True, exist_ok=True)
    stages = Stages(root, force=force)
    files = _make_data(stages, root, run, seed)
    store = _make_store(stages, run, files)
    _train(stages, run, settings, store)
    final = _export(stages, run, root)
    _evaluate(stages, root, run, final, files["benchmark"], backend, seed)
    summary = _summary(stages, root, run, store)
    write_json_atomically(root / SUMMARY_FILE, summary)
    _report(root, summary, time.perf_counter() - started)


def _make_data(stages: Stages, root: Path, run: RunConfig, seed: int) -> dict[str, Path]:
    from tools.base_student import SHIPPED
    from tools.word_problems import write_problem_set

    data = root / "data"
    files = {name: data / f"{name}.jsonl" for name in ("trajectories", "benchmark", "validation")}
    base = Path(run.paths.hf_model)

    def make() -> None:
        write_problem_set(data, problems=PROBLEMS, solutions=SOLUTIONS, benchmark=HELD_OUT, seed=seed)
        shutil.rmtree(base, ignore_errors=True)
        shutil.copytree(SHIPPED, base)

    shipped = fingerprint_of_files([path for path in SHIPPED.iterdir() if path.is_file()])
    key = [PROBLEMS, SOLUTIONS, HELD_OUT, seed, shipped]
    command = f"python -m tools.word_problems --output {data} --seed {seed}"
    stages.run("data", command, key, [*files.values(), base], make)
    return files


def _make_store(stages: Stages, run: RunConfig, files: dict[str, Path]) -> TrajectoryStore:
    config = PrepareConfig(
        inputs=(str(files["trajectories"]),),
        tokenizer=run.paths.hf_model,
        output=run.paths.store,
        trajectories_per_group=run.plan.trajectories_per_group or 8,
        max_response_tokens=run.objective.max_response_tokens,
        overwrite=True,
        force=stages.force,
    )
    command = f"offgrpo prepare --input {files['trajectories']} --tokenizer {config.tokenizer} --output {config.output}"
    key = [
        fingerprint_of_file(files["trajectories"]),
        tokenizer_fingerprint(run.paths.hf_model),
        config.trajectories_per_group,
        config.max_response_tokens,
    ]

    def make() -> None:
        _print(summary_lines(prepare(config)))

    stages.run("prepare", command, key, [Path(config.output) / MANIFEST], make)
    return TrajectoryStore.open(config.output)


def _train(stages: Stages, run: RunConfig, settings: list[str], store: TrajectoryStore) -> None:
    from checkpoints_conversion import hf_to_megatron

    paths = run.paths
    weights = fingerprint_of_files(sorted(Path(paths.hf_model).glob("*.safetensors")))
    stages.run(
        "convert",
        f"offgrpo convert hf-to-megatron --hf {paths.hf_model} --megatron {paths.megatron}",
        weights,
        [Path(paths.megatron)],
        lambda: _void(hf_to_megatron(Path(paths.hf_model), Path(paths.megatron), overwrite=True)),
    )
    common = [weights, store.manifest.fingerprint, to_dict(run.model), to_dict(run.layout)]
    sets = [argument for setting in settings for argument in ("--set", setting)]
    reference_key = [common, to_dict(run.plan)]
    stages.run(
        "reference",
        "offgrpo reference quickstart",
        reference_key,
        [Path(paths.reference) / MANIFEST],
        lambda: _command("reference", "quickstart", *sets, "--force"),
    )

    def plan() -> None:
        made = build_plan(store, run.plan, run.objective)
        save_plan(made, paths.plan)

    plan_key = [store.manifest.fingerprint, to_dict(run.plan), to_dict(run.objective)]
    stages.run("plan", "offgrpo plan quickstart", plan_key, [Path(paths.plan) / MANIFEST], plan)
    _print(plan_lines(load_plan(paths.plan), run, tflops_per_gpu=TFLOPS_PER_PROCESS))
    train_key = [common, plan_key, to_dict(run.optimizer), run.seed]
    force = ["--force"] if stages.force or stages.done.get("train", {}).get("key") else []
    stages.run(
        "train",
        "offgrpo train quickstart",
        train_key,
        [Path(paths.output) / MANIFEST],
        lambda: _command("train", "quickstart", *sets, *force),
    )


def _void(_: object) -> None:
    """Drops a result."""


def _export(stages: Stages, run: RunConfig, root: Path) -> Path:
    from checkpoints_conversion import megatron_to_hf

    final, trained = root / "final_hf", Path(run.paths.output) / "checkpoints"
    stages.run(
        "export",
        f"offgrpo convert megatron-to-hf --hf {run.paths.hf_model} --megatron {trained} --output {final}",
        stages.done["train"]["key"],
        [final],
        lambda: _void(megatron_to_hf(trained, Path(run.paths.hf_model), final, overwrite=True)),
    )
    return final


def _evaluate(
    stages: Stages, root: Path, run: RunConfig, final: Path, benchmark: Path, backend: str, seed: int
) -> None:
    sampling = [
        "--benchmark", str(benchmark), "--samples", str(SAMPLES), "--temperature", str(TEMPERATURE),
        "--top-p", str(TOP_P), "--max-tokens", str(run.objective.max_response_tokens), "--backend", backend,
        "--seed", str(seed), "--force",
    ]  # fmt: skip
    for name, model in (("eval_base", Path(run.paths.hf_model)), ("eval_final", final)):
        arguments = ["eval", "--model", str(model), "--output", str(root / name), *sampling]
        key = [fingerprint_of_files([*sorted(model.glob("*.safetensors")), benchmark]), sampling]
        stages.run(
            name,
            f"offgrpo {' '.join(arguments)}",
            key,
            [root / name / MANIFEST],
            partial(_command, *arguments),
        )


def _command(*arguments: str) -> None:
    """Runs an `offgrpo` command in a process of its own, whose memory and settings end with it."""
    completed = subprocess.run([sys.executable, "-m", "megatron_offgrpo.cli", *arguments])
    if completed.returncode:
        raise OffgrpoError(
            "this stage failed, see above",
            where=f"offgrpo {arguments[0]}",
            got=f"exit status {completed.returncode}",
            remedy="mend it and run the same command again",
        )


def _summary(stages: Stages, root: Path, run: RunConfig, store: TrajectoryStore) -> dict[str, Any]:
    from checkpoints_conversion import changed_weights
    from megatron_offgrpo.training.run_folder import read_metrics

    steps = read_metrics(Path(run.paths.output))
    seconds = sum(step["seconds"] for step in steps)
    base, final = (
        json.loads((root / name / "metrics.json").read_text("utf-8")) for name in ("eval_base", "eval_final")
    )
    layout = run.layout
    return {
        "base": base,
        "final": {**final, "bf16_weights_changed": changed_weights(Path(run.paths.hf_model), root / "final_hf")},
        "groups": store.manifest.counts["groups"],
        "train": {
            "steps": len(steps),
            "tokens_per_second": sum(step["packed_tokens"] for step in steps) / seconds,
            "trajectories_per_second": sum(step["trajectories"] for step in steps) / seconds,
            "peak_memory_bytes": int(max(step["peak_memory_bytes"] for step in steps)),
            "final_loss": steps[-1]["loss"],
            "mean_grad_norm": float(np.mean([step["grad_norm"] for step in steps])),
        },
        "reference": {"max_abs_logp_difference_at_step_0": steps[0]["max_abs_logp_difference"]},
        "layout": {
            "tp": layout.tp, "pp": layout.pp, "dp": layout.processes // (layout.tp * layout.pp * layout.cp),
            "cp": layout.cp,
        },
        "stage_seconds": stages.seconds(),
    }  # fmt: skip


def _report(root: Path, summary: dict[str, Any], seconds: float) -> None:
    from megatron_offgrpo.reporting.report import write_report

    page = write_report(root)
    base, final = summary["base"], summary["final"]
    _print(
        [
            f"base   {_accuracy(base)}",
            f"final  {_accuracy(final)}",
            f"report {page}   ({seconds:.0f} s)",
        ]
    )


def _accuracy(metrics: dict[str, Any]) -> str:
    low, high = metrics["ci95"]
    return f"accuracy {100 * metrics['accuracy']:.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f}"


def _print(lines: list[str]) -> None:
    print("\n".join(lines), flush=True)
