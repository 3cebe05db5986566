"""The quick start's recipe made as small as a test of the launchers allows, and its chain submitted to the cluster."""

from pathlib import Path

from tests.system.slurm.cluster import REPOSITORY, Cluster
from tools.base_student import SHIPPED
from tools.word_problems import write_problem_set

RECIPE = "quickstart"
NUM_STEPS = 48
"""12 groups, one a step, 4 epochs: some seconds, so that a signal arrives in the middle."""
TRAIN_OPTIONS = "--nodes=2 --ntasks-per-node=2 --gpus-per-node=2 --cpus-per-task=1"


def settings(folder: Path, *more: str) -> list[str]:
    """--set arguments: artefacts in `folder`, the base student that is shipped, short steps of several packs."""
    names = {"store": "store", "megatron": "base_megatron", "reference": "reference", "plan": "plan", "output": "train"}
    values = [f"paths.{name}={folder / 'run' / part}" for name, part in names.items()]
    values += [f"paths.hf_model={SHIPPED}", "plan.groups_per_step=1", "plan.trajectories_per_group=4"]
    values += ["plan.epochs=4", "plan.max_pack_tokens=512", *more]
    return [word for value in values for word in ("--set", value)]


def submit(cluster: Cluster, folder: Path, *, eval_shards: int = 1) -> dict[str, str]:
    """Submits everything from raw solutions to the report; task name -> job id."""
    write_problem_set(folder / "data", problems=12, solutions=8, benchmark=4, seed=0)
    arguments = ["--input", folder / "data/trajectories.jsonl", "--benchmark", folder / "data/benchmark.jsonl"]
    arguments += ["--prepare-shards=2", f"--eval-shards={eval_shards}", "--prepare-args=--workers 1"]
    arguments += ["--eval-args=--samples 1 --max-tokens 64 --backend hf --precision fp32"]
    small = {"PREPARE": "", "CONVERT": "", "RUN": "", "EVAL": "--gpus-per-node=0"}
    small["REFERENCE"] = "--nodes=1 --ntasks-per-node=1 --gpus-per-node=1"
    options = {f"OFFGRPO_SBATCH_{kind}": f"--cpus-per-task=1 {more}" for kind, more in small.items()}
    # The last node is for the tests of preemption.
    options |= {"OFFGRPO_SBATCH_TRAIN": TRAIN_OPTIONS, "OFFGRPO_SBATCH": f"--exclude={cluster.nodes[-1]}"}
    command = [REPOSITORY / "slurm" / "pipeline.sh", RECIPE, *settings(folder), *arguments]
    lines = cluster.run(*command, environment=options, cwd=folder).splitlines()
    return {line.split()[0]: line.split()[1] for line in lines}
