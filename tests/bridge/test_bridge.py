"""Megatron-Bridge as a second opinion: it loads our checkpoints, writes the same ones, and exports the same models.

Run by `make test-bridge`. Bridge works in an environment of its own (`make install-bridge`), in one process for all
models (`worker.py`), with its default layers: those of Transformer Engine, of which there is a stand-in. What it wrote
is compared here.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM

from checkpoints_conversion import hf_to_megatron, megatron_to_hf
from megatron_offgrpo.planning.plan import build_plan
from megatron_offgrpo.planning.plan_files import save_plan
from tests.distributed.toy import toy_run, write_hf_model, write_toy_store
from tests.system.cli import offgrpo
from tests.system.test_two_processes import RECIPE, settings
from tests.unit.conversion.tiny_models import MODELS, VOCAB, save_tiny_model
from tests.unit.data.tiny import save_tokenizer

REPOSITORY = Path(__file__).parents[2]
PYTHON = REPOSITORY / ".venv-bridge" / "bin" / "python"
STAND_INS = REPOSITORY / "tests" / "stand_ins"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-bridge here: make install-bridge")

TOLERANCE = 1e-5
IDS = torch.randint(0, VOCAB, (1, 200), generator=torch.Generator().manual_seed(5))
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# The tiny models; Llama with the scaling of Llama 3.1 and of 3.2, whose other constants Megatron has; half precision.
ROPES = {"llama31": LLAMA31_ROPE, "llama32": {**LLAMA31_ROPE, "factor": 32.0}}
HALF = "qwen2_bf16"
NAMES = (*MODELS, *ROPES, HALF)
# Bridge has no Mixtral: it loads ours by the arguments in it, as any checkpoint of Megatron-LM.
OF_BRIDGE = tuple(name for name in NAMES if name != "mixtral")
# Rounding is larger than what is looked for in half precision; those weights are compared to the bit.
COMPUTED = tuple(name for name in NAMES if name != HALF)

CONSTANTS = "Megatron-Core has Llama 3.1's scaling as constants: low 1, high 4, 8192 tokens"
LOADER = "Bridge's loader of Megatron-LM's checkpoints passes neither rope_scaling_factor nor linear scaling on"
CANNOT_BY_ARGUMENTS = {"llama3_tied": CONSTANTS, "llama32": LOADER, "llama_linear_rope": LOADER}
CANNOT_BY_BRIDGE = {"llama3_tied": CONSTANTS}

# Settings that may differ, since they do not say what the model is.
NOT_OF_THE_MODEL = {
    "perform_initialization": "Bridge skips it where weights follow",
    "autocast_dtype": "of enable_autocast, which is off",
    "pipeline_dtype": "between pipeline stages",
    "cp_comm_type": "between context-parallel ranks",
    "moe_token_dispatcher_type": "between expert-parallel ranks",
    "attention_softmax_in_fp32": "of Megatron's own attention; Transformer Engine's is in fp32 always",
    "moe_aux_loss_coeff": "of a loss that Bridge's training adds",
}


def cases(names: tuple[str, ...], cannot: dict[str, str]) -> list:
    """Strict: a model that Bridge can compute after all fails as well."""
    marks = {
        name: pytest.mark.xfail(reason=reason, strict=True, raises=AssertionError) for name, reason in cannot.items()
    }
    return [pytest.param(name, marks=marks[name]) if name in marks else name for name in names]


def save_model(name: str, folder: Path) -> None:
    """One of NAMES with a tokenizer, which Bridge's export asks for."""
    if name in ROPES:
        save_tiny_model("llama3_tied", folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config |= {"rope_parameters": ROPES[name], "max_position_embeddings": 131072}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    elif name == HALF:
        save_tiny_model("qwen2", folder, dtype=torch.bfloat16)
    else:
        save_tiny_model(name, folder)
    save_tokenizer(folder)


def train(folder: Path) -> None:
    """Two steps of a mixture of experts on two expert-parallel ranks; its vocabulary is padded."""
    folder.mkdir()
    store = write_toy_store(folder / "store")
    write_hf_model(folder / "hf", "qwen3_moe")
    save_tokenizer(folder / "hf")
    hf_to_megatron(folder / "hf", folder / "megatron")
    run = toy_run(epochs=1)
    save_plan(build_plan(store, run.plan, run.objective), folder / "plan")
    for verb in ("reference", "train"):
        offgrpo(verb, RECIPE, *settings(folder, "plan.epochs=1", "layout.ep=2"), cwd=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """For each model `hf`, our `megatron`, and what Bridge made of both; a run in `trained`."""
    whole = tmp_path_factory.mktemp("bridge")
    torch.save(IDS, whole / "ids.pt")
    for name in NAMES:
        save_model(name, whole / name / "hf")
        hf_to_megatron(whole / name / "hf", whole / name / "megatron")
    train(whole / "trained")
    # Bridge imports Transformer Engine whatever it is to do, and builds its layers; the stand-in's are for the CPU.
    settings_of_bridge = {"PYTHONPATH": str(STAND_INS), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **settings_of_bridge, "OMP_NUM_THREADS": "1"}
    command = [PYTHON, "-m", "tests.bridge.worker", whole]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        # Not an AssertionError: those are what a model that Bridge cannot compute is expected to raise.
        pytest.fail(done.stderr[-8000:])
    return whole


def difference(folder: Path, name: str, how: str) -> float:
    """The largest between Bridge's logits and those of Transformers; Megatron's padding of the vocabulary left out."""
    bridge = torch.load(folder / name / "logits.pt")[how][..., :VOCAB]
    model = AutoModelForCausalLM.from_pretrained(folder / name / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        found = float((bridge - model(IDS).logits).abs().max())
    print(f"{name} {how}: {found:.1e}")
    return found


def stored(folder: Path) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors of a Megatron checkpoint, and the keys of its objects."""
    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors, entries.keys() - tensors.keys()


def exported(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def unequal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names that one side lacks, or whose dtype, shape or bits differ."""

    def is_equal(name: str) -> bool:
        one, other = ours[name], theirs[name]
        return one.dtype == other.dtype and torch.equal(one, other)

    return sorted(name for name in ours.keys() | theirs if name not in ours or name not in theirs or not is_equal(name))


def test_families_of_bridge(folder):
    """A family that a later Bridge has is compared as well."""
    found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    assert tuple(name for name in NAMES if found[name]["supported"]) == OF_BRIDGE


@pytest.mark.parametrize("name", cases(COMPUTED, CANNOT_BY_ARGUMENTS))
def test_our_checkpoint_alone_gives_the_logits(name, folder):
    assert difference(folder, name, "by_arguments") <= TOLERANCE


@pytest.mark.parametrize("name", cases(tuple(n for n in COMPUTED if n in OF_BRIDGE), CANNOT_BY_BRIDGE))
def test_our_checkpoint_in_the_model_of_bridge_gives_the_logits(name, folder):
    assert difference(folder, name, "by_bridge") <= TOLERANCE


@pytest.mark.parametrize("name", OF_BRIDGE)
def test_our_arguments_say_what_bridge_reads(name, folder):
    found = json.loads((folder / "found.json").read_text(encoding="utf-8"))[name]
    ours, theirs = found["by_arguments"], found["by_bridge"]
    differ = {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key] and key not in NOT_OF_THE_MODEL}
    assert not differ


@pytest.mark.parametrize("name", OF_BRIDGE)
def test_checkpoints_are_the_same(name, folder):
    ours, our_objects = stored(folder / name / "megatron" / "release")
    theirs, their_objects = stored(folder / name / "bridge_megatron" / "iter_0000000")
    assert not unequal(ours, theirs)
    # Megatron-Core 0.19 puts what is not sharded among the objects; ours has common.pt. The others are those of
    # Transformer Engine's modules; the stand-in's norms have none.
    assert their_objects - {"common_state/shard_0_1"} <= our_objects


@pytest.mark.parametrize("name", OF_BRIDGE)
def test_exports_are_the_same(name, folder, tmp_path):
    model = folder / name
    source = exported(model / "hf")
    assert not unequal(source, exported(model / "bridge_hf"))
    megatron_to_hf(model / "megatron", model / "hf", tmp_path / "of_ours")
    assert not unequal(source, exported(tmp_path / "of_ours"))
    megatron_to_hf(model / "bridge_megatron", model / "hf", tmp_path / "of_bridge")
    assert not unequal(source, exported(tmp_path / "of_bridge"))


def test_bridge_exports_a_trained_checkpoint(folder, tmp_path):
    trained = folder / "trained"
    megatron_to_hf(trained / "train" / "checkpoints", trained / "hf", tmp_path / "ours")
    ours = exported(tmp_path / "ours")
    assert not unequal(ours, exported(trained / "bridge_hf"))
    assert len(unequal(ours, exported(trained / "hf"))) == len(ours)
