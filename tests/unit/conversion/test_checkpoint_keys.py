"""Keys and shapes of converted checkpoints are those that Transformer Engine's layer asks for.

`checkpoint_keys.json` was derived from Megatron-Core's source: get_gpt_layer_with_transformer_engine_spec (norms
fused into linear_qkv and, in dense layers, linear_fc1; a norm of its own before a router), TEGroupedMLP and
SequentialMLP (one key for all experts), TransformerBlock.sharded_state_dict (a leading layer dimension). It lists what
each of the tiny models has, with the shape of each tensor and, for the `_extra_state` objects, that of their grid.
"""

import itertools
import json
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from checkpoints_conversion import hf_to_megatron
from checkpoints_conversion.megatron_reader import MegatronWeights, iteration_folder
from megatron_offgrpo.config import LayoutConfig, ModelConfig
from megatron_offgrpo.model.gpt import build_model
from megatron_offgrpo.model.hf_config import architecture_of
from megatron_offgrpo.parallel import runtime
from tests.unit.conversion.tiny_models import config_of, save_tiny_model

EXPECTED = json.loads(Path(__file__).with_name("checkpoint_keys.json").read_text())
VOCAB_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")


@pytest.fixture(scope="module")
def one_process():
    yield runtime.start(LayoutConfig(), seed=0)
    runtime.stop()


@pytest.mark.parametrize("name", list(EXPECTED))
def test_converted_checkpoint(name, tmp_path):
    hf_to_megatron(save_tiny_model(name, tmp_path / "hf"), tmp_path / "megatron")
    weights = MegatronWeights(iteration_folder(tmp_path / "megatron"))
    assert {key: list(entry.size) for key, entry in weights.tensors.items()} == EXPECTED[name]["tensors"]
    objects = {k for k, v in weights.metadata.state_dict_metadata.items() if isinstance(v, BytesStorageMetadata)}
    expected = set()
    for key, grid in EXPECTED[name]["extra_states"].items():
        for place in itertools.product(*map(range, grid)):
            expected.add(f"{key}/shard_{'.'.join(map(str, place))}_{'.'.join(map(str, grid))}")
    assert objects == expected
    # Megatron-Core reads these names back as what it would ask for.
    assert {ShardedObject.empty_from_unique_key(name).unique_key for name in objects} == objects


@pytest.mark.parametrize("name", list(EXPECTED))
def test_the_model_built_here_asks_for_the_same_tensors(name, one_process):
    architecture = architecture_of(config_of(name).to_dict())
    (model,) = build_model(architecture, LayoutConfig(), ModelConfig(precision="fp32"))
    state = model.sharded_state_dict()
    apply_factories(state)
    tensors = {v.key: list(v.global_shape) for v in nested_values(state) if isinstance(v, ShardedTensor)}
    for key in VOCAB_KEYS:
        if key in tensors:
            # The model's own rows are padded to a multiple of 128; the checkpoint has the real ones.
            assert tensors[key][0] == 128
            tensors[key][0] = 101
    assert tensors == EXPECTED[name]["tensors"]
    objects = {v.key for v in nested_values(state) if isinstance(v, ShardedObject)}
    assert objects <= set(EXPECTED[name]["extra_states"])
