"""Real model solutions through the whole chain: prepare, convert, reference, plan, three training steps at TP=2."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.distributed.toy import in_folder, toy_run
from tests.system.cli import offgrpo
from tests.unit.data.tiny import save_tokenizer

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "trajectories" / "gsm8k.jsonl.gz"

pytestmark = pytest.mark.skipif(not DATA.exists(), reason="the real trajectories (shared/data) are not on this machine")


NUM_GROUPS = 12
"""Of the file's 880, so that the test takes half a minute; tests/system/test_prepare.py reads all of it."""


def first_groups(folder: Path) -> tuple[Path, dict[str, int]]:
    """The file's first groups as they are, and their composition by the labels they came with."""
    lines = gzip.decompress(DATA.read_bytes()).splitlines(keepends=True)[:NUM_GROUPS]
    path = folder / "gsm8k_first.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(lines)))
    labels = [{solution["label"] for solution in json.loads(line)["solutions"]} for line in lines]
    count = {"all_positive": labels.count({1}), "mixed": labels.count({0, 1}), "all_negative": labels.count({0})}
    return path, {"total": NUM_GROUPS, **count}


def write_student(folder: Path) -> None:
    """A tokenizer that knows the file's characters, and two random layers over it."""
    save_tokenizer(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=401,
        max_position_embeddings=4096,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def test_gsm8k_solutions_train_at_tp_2(tmp_path):
    write_student(tmp_path / "hf")
    paths = vars(in_folder(toy_run(), tmp_path).paths)
    values = [f"paths.{name}={value}" for name, value in paths.items()]
    values += ["layout.tp=2", "layout.sequence_parallel=true", "layout.processes=2", "model.precision=bf16"]
    sets = [argument for value in values for argument in ("--set", value)]
    recipe = "tests.distributed.toy:gsm8k_recipe"

    store, hf = tmp_path / "store", tmp_path / "hf"
    file, composition = first_groups(tmp_path)
    offgrpo("prepare", "--input", file, "--tokenizer", hf, "--output", store, cwd=tmp_path)
    counts = json.loads((store / "manifest.json").read_text())["counts"]
    # math-verify agrees with the labels of this file on every solution.
    assert counts["groups"] == composition
    offgrpo("convert", "hf-to-megatron", "--hf", hf, "--megatron", tmp_path / "megatron", cwd=tmp_path)
    planned = offgrpo("plan", recipe, *sets, cwd=tmp_path)
    assert "steps          3" in planned.stdout
    offgrpo("reference", recipe, *sets, cwd=tmp_path)
    offgrpo("train", recipe, *sets, cwd=tmp_path)
    steps = [json.loads(line) for line in (tmp_path / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [step["trajectories"] for step in steps] == [20, 20, 8]
    assert steps[0]["max_abs_logp_difference"] == 0.0
    assert steps[2]["max_abs_logp_difference"] > 0.0
    assert all(step["grad_norm"] > 0 for step in steps)
