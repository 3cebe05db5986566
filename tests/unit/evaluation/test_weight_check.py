"""The weight check: equal log-probs agree to their last digits, another model is found and named."""

import json

import numpy as np
import pytest
import torch

from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.errors import CheckpointError, ConfigError, DataError
from megatron_offgrpo.evaluation.generation import BackendConfig, open_backend
from megatron_offgrpo.evaluation.weight_check import check_weights
from megatron_offgrpo.training.reference_cache import inputs_of, write_reference
from tests.distributed.toy import architecture
from tests.unit.reporting.run_folder import write_small_store
from tools.base_student import make_model, make_tokenizer


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A model, a store of six trajectories, and the reference that the model gives."""
    root = tmp_path_factory.mktemp("weights")
    make_tokenizer(0).save_pretrained(root / "model")
    make_model(0).save_pretrained(root / "model")
    write_small_store(root / "store")
    store = TrajectoryStore.open(root / "store")
    whole = [store.trajectory(index) for index in range(store.num_trajectories)]
    with open_backend(BackendConfig(root / "model", "hf", "fp32")) as backend:
        scored = backend.logprobs([[*one.prompt_ids.tolist(), *one.response_ids.tolist()] for one in whole])
    # Prompts have two tokens, the first token of a sequence has no log-prob.
    reference = np.concatenate([np.array(values[1:], np.float32) for values in scored])
    write_reference(root / "reference", reference, inputs_of(store, "w", "fp32", architecture("qwen2")), {})
    return root


def check(paths, output, model="model", **values):
    backends = values.pop("backends", [BackendConfig(paths / model, "hf", "fp32")])
    return check_weights(paths / "store", paths / "reference", paths / model, backends, values.pop("count", 99), output)


def test_the_same_model_agrees(paths, tmp_path):
    result = check(paths, tmp_path / "new" / "weights.json")
    assert (result["agree"], result["trajectories"], result["tokens"]) == (True, 6, 24)
    (pair,) = result["pairs"]
    assert (pair["first"], pair["second"]) == ("trainer", "hf")
    assert pair["max_abs"] < 1e-5
    assert json.loads((tmp_path / "new" / "weights.json").read_text()) == result


def test_trajectories_are_spread_over_the_store(paths, tmp_path):
    result = check(paths, tmp_path / "w.json", count=2)
    assert (result["trajectories"], result["tokens"]) == (2, 3 + 5)


def test_another_model_is_found(paths, tmp_path):
    make_tokenizer(0).save_pretrained(paths / "other")
    other = make_model(0)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(3)
    other.save_pretrained(paths / "other")
    with pytest.raises(CheckpointError, match=r"trainer and hf do not compute the same model.*at most 0\.001 nats"):
        check(paths, tmp_path / "w.json", "other")
    written = json.loads((tmp_path / "w.json").read_text())
    assert not written["agree"]
    assert written["pairs"][0]["mean_abs"] > 1e-3


def test_what_is_missing_is_named(paths, tmp_path):
    with pytest.raises(ConfigError, match="nothing to compare"):
        check(paths, tmp_path / "w.json", backends=[])
    with pytest.raises(DataError, match="no finished reference"):
        check_weights(paths / "store", tmp_path, paths / "model", [BackendConfig(paths, "hf")], 1, tmp_path / "w.json")
