"""The whole chain on a real Slurm, by the files of slurm/ as they are: solutions to report, signal in mid-run."""

import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_offgrpo.data.prepare import prepare
from megatron_offgrpo.data_config import PrepareConfig
from tests.system.slurm.cluster import REPOSITORY
from tests.system.slurm.toy_chain import NUM_STEPS, RECIPE, TRAIN_OPTIONS, settings
from tools.base_student import SHIPPED


def outputs(folder: Path) -> str:
    files = [*sorted(folder.glob("*.out")), *sorted(folder.glob("logs/*/attempt-*.log"))]
    return "\n".join(f"== {file.name}\n{file.read_text()[-1500:]}" for file in files)


def test_the_chain_runs_to_a_report(chain, cluster):
    folder, jobs = chain
    states = {name: cluster.job(job)["JobState"] for name, job in jobs.items()}
    assert set(states.values()) == {"COMPLETED"}, f"{states}\n{outputs(folder)}"
    assert [name for name in jobs if not name.startswith("eval") or "shards" not in name] == [
        "prepare_shards", "prepare", "convert", "plan", "reference", "train", "export",
        "eval_base", "eval_final", "report",
    ]  # fmt: skip
    assert (folder / "run" / "report.html").stat().st_size > 10_000
    train = cluster.job(jobs["train"])
    assert (train["NumNodes"], train["NumTasks"], train["Restarts"]) == ("2", "4", "0")
    metrics = [json.loads(line) for line in (folder / "run/train/metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == NUM_STEPS
    # The reference was made by one rank, of other packs.
    assert metrics[0]["max_abs_logp_difference"] < 1e-4


def test_shards_make_the_store_of_one_process(chain, tmp_path):
    folder, _ = chain
    config = PrepareConfig(
        inputs=(str(folder / "data/trajectories.jsonl"),),
        tokenizer=str(SHIPPED),
        output=str(tmp_path / "store"),
        trajectories_per_group=4,
        max_response_tokens=192,
        workers=1,
    )
    prepare(config)
    one, sharded = (
        json.loads((path / "manifest.json").read_text()) for path in (tmp_path / "store", folder / "run/store")
    )
    assert sharded["fingerprint"] == one["fingerprint"]


def test_a_signal_saves_requeues_resumes_and_changes_nothing(chain, cluster):
    folder, _ = chain
    output = folder / "signalled" / "train"
    script = REPOSITORY / "slurm" / "train.sbatch"
    job = cluster.sbatch(
        *TRAIN_OPTIONS.split(), script, RECIPE, *settings(folder, f"paths.output={output}"), cwd=folder
    )
    deadline = time.monotonic() + 200
    while not (output / "metrics.jsonl").exists() or (output / "metrics.jsonl").read_text().count("\n") < 2:
        assert time.monotonic() < deadline, outputs(folder)
        time.sleep(0.05)
    # What `--signal=B:USR1@600` sends before the time limit; Slurm looks at the limit only every half minute.
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    ended = cluster.wait(job, 570)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), outputs(folder)
    first, second = sorted((folder / "logs" / f"offgrpo-train-{job}").glob("attempt-*.log"))
    assert "stopped by a signal after step" in first.read_text()
    assert "resumed from" in second.read_text()
    lines = [(where / "metrics.jsonl").read_text().splitlines() for where in (folder / "run" / "train", output)]
    assert [json.loads(line)["loss"] for line in lines[0]] == [json.loads(line)["loss"] for line in lines[1]]
    cluster.run(
        f"{cluster.environment['OFFGRPO_VENV']}/bin/offgrpo", "convert", "megatron-to-hf", "--hf", SHIPPED,
        "--megatron", output / "checkpoints", "--output", folder / "signalled" / "hf",
    )  # fmt: skip
    expected, got = (load_file(folder / part / "model.safetensors") for part in ("run/final_hf", "signalled/hf"))
    assert all(torch.equal(expected[name], got[name]) for name in expected)
