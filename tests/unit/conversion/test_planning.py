"""The plan: what does not fit is listed in one error before anything is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_conversion import hf_to_megatron, megatron_to_hf, plan, verify
from megatron_offgrpo.errors import CheckpointError, ConfigError
from tests.unit.conversion.tiny_models import save_tiny_model

Q = "model.layers.0.self_attn.q_proj.weight"


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_counts_and_bytes_of_a_plan(tmp_path):
    ready = plan(save_tiny_model("qwen2", tmp_path, dtype=torch.bfloat16))
    # Per layer: q 48*48, k and v 24*48 each, o 48*48, 3 MLP matrices 48*80, biases 48+24+24, two norms of 48.
    layer = 48 * 48 + 2 * 24 * 48 + 48 * 48 + 3 * 48 * 80 + 96 + 96
    parameters = 4 * layer + 2 * 101 * 48 + 48
    assert ready.num_parameters == parameters
    assert ready.total_bytes == 2 * parameters
    assert f"{parameters:,} parameters" in ready.describe()


def test_all_problems_are_in_one_error_and_nothing_is_written(tmp_path):
    hf = save_tiny_model("qwen2", tmp_path / "hf")

    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.extra"] = torch.zeros(1)
        tensors[Q] = torch.zeros(48, 47)
        tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(24, 48, dtype=torch.bfloat16)

    change_weights(hf, spoil)
    with pytest.raises(CheckpointError) as caught:
        hf_to_megatron(hf, tmp_path / "megatron")
    message = str(caught.value)
    assert "missing model.norm.weight, shape [48]" in message
    assert "unexpected model.layers.0.mlp.extra" in message
    assert f"wrong shape of {Q}: expected [48, 48], got [48, 47]" in message
    assert "mixed dtypes for decoder.layers.self_attention.linear_qkv.weight" in message
    assert "4 tensors do not fit" in message
    assert not (tmp_path / "megatron").exists()


def test_a_tensor_in_two_files_and_one_that_the_index_does_not_know(tmp_path):
    hf = save_tiny_model("qwen2", tmp_path, max_shard_size="100KB")
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    here, there = sorted(set(index["weight_map"].values()))[:2]
    tensors = load_file(hf / there)
    moved = next(name for name, file in index["weight_map"].items() if file == here)
    save_file({**tensors, moved: torch.zeros(3), "stray": torch.zeros(2)}, hf / there, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        plan(hf)
    assert f"duplicated {moved}: in {here} and in {there}" in str(caught.value)
    assert f"unexpected stray: in {there}" in str(caught.value)


def test_buffers_that_no_model_reads_are_named_and_left_out(tmp_path):
    hf = save_tiny_model("llama_linear_rope", tmp_path / "hf")
    name = "model.layers.2.self_attn.rotary_emb.inv_freq"
    change_weights(hf, lambda tensors: tensors.update({name: torch.ones(8)}))
    assert f"ignored (no model reads it): {name}" in plan(hf).describe()
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "out")
    assert name not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_stored_copy_of_a_tied_embedding_must_equal_it(tmp_path):
    hf = save_tiny_model("qwen2_tied", tmp_path / "hf")
    copy = {"lm_head.weight": load_file(hf / "model.safetensors")["model.embed_tokens.weight"].clone()}
    change_weights(hf, lambda tensors: tensors.update(copy))
    hf_to_megatron(hf, tmp_path / "same")
    copy["lm_head.weight"][5, 5] += 1
    change_weights(hf, lambda tensors: tensors.update(copy))
    with pytest.raises(CheckpointError, match=r"ties the embeddings, but lm_head\.weight differs"):
        hf_to_megatron(hf, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model_type": "gemma2"}, ["Megatron-Core cannot express", "soft-capped"]),
        ({"model_type": "olmo2"}, ["Megatron-Core cannot express", "norms stand after each sublayer"]),
        ({"model_type": "gpt2"}, ["no conversion table", "gpt2"]),
        ({"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "'silu'"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, ["rope_parameters", "llama3"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_scaling", "llama3"]),
        ({"use_sliding_window": True}, ["use_sliding_window = True"]),
        ({"layer_types": ["sliding_attention"] * 4}, ["layer_types", "full_attention"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"auto_map": {"AutoModel": "x.y"}}, ["auto_map"]),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, ["architectures", "causal language model"]),
        ({"brand_new_field": 3, "another": 4}, ["brand_new_field = 3", "another = 4", "2 fields", "unknown field"]),
    ],
)
def test_config_values_that_megatron_cannot_express_are_named(changes, names, tmp_path):
    hf = save_tiny_model("qwen2", tmp_path)
    change_config(hf, **changes)
    with pytest.raises(ConfigError) as caught:
        plan(hf)
    for name in names:
        assert name in str(caught.value)


def test_mistrals_window_is_in_force_whenever_it_is_set(tmp_path):
    hf = save_tiny_model("mistral", tmp_path)
    change_config(hf, sliding_window=4096)
    with pytest.raises(ConfigError, match="sliding_window = 4096"):
        plan(hf)


INV_FREQ = "model.layers.2.self_attn.rotary_emb.inv_freq"
NORM = "model.layers.2.input_layernorm.weight"
OTHER_DTYPES = {
    "F64": torch.float64,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@pytest.mark.parametrize("dtype", OTHER_DTYPES)
def test_what_is_not_wanted_may_have_any_dtype(dtype, tmp_path):
    hf = save_tiny_model("qwen2", tmp_path / "hf")
    change_weights(hf, lambda tensors: tensors.update({INV_FREQ: torch.ones(6).to(OTHER_DTYPES[dtype])}))
    assert f"ignored (no model reads it): {INV_FREQ}" in plan(hf).describe()
    hf_to_megatron(hf, tmp_path / "megatron")
    assert verify(hf, tmp_path / "megatron", compare_logits=False).ok


@pytest.mark.parametrize("dtype", OTHER_DTYPES)
def test_a_wanted_tensor_of_another_dtype_and_an_unexpected_one_are_named_as_such(dtype, tmp_path):
    hf = save_tiny_model("qwen2", tmp_path / "hf")

    def spoil(tensors):
        tensors[NORM] = tensors[NORM].to(OTHER_DTYPES[dtype])
        tensors["model.layers.0.self_attn.masked_bias"] = torch.ones(4).to(OTHER_DTYPES[dtype])

    change_weights(hf, spoil)
    with pytest.raises(CheckpointError) as caught:
        hf_to_megatron(hf, tmp_path / "megatron", dtype="bf16")
    message = str(caught.value)
    kind = "fp8 weights are not converted" if dtype.startswith("F8") else "this dtype is not converted"
    assert f"dtype of {NORM} is {dtype}: {kind}, expected one of BF16, F16, F32" in message
    assert "unexpected model.layers.0.self_attn.masked_bias" in message
    assert "2 tensors do not fit" in message
    assert "remedy: check that config.json belongs to these weights; save the model in bf16" in message
    assert "download" not in message
    assert "--dtype" not in message


def test_a_dtype_that_nobody_here_knows_is_not_damage(tmp_path):
    hf = save_tiny_model("qwen2", tmp_path / "hf")
    change_weights(hf, lambda tensors: tensors.update({INV_FREQ: torch.ones(6, dtype=torch.uint8)}))
    path = hf / "model.safetensors"
    # Same length, so that every offset stays right.
    path.write_bytes(path.read_bytes().replace(b'"U8"', b'"X9"'))
    assert f"ignored (no model reads it): {INV_FREQ}" in plan(hf).describe()


@pytest.mark.parametrize("changed", [[NORM], [Q], ["lm_head.weight", "model.embed_tokens.weight"], [NORM, Q]])
@pytest.mark.parametrize("to", [torch.float16, torch.float32])
def test_mixed_dtypes_are_converted_with_dtype_and_refused_without(changed, to, tmp_path):
    hf = save_tiny_model("qwen2", tmp_path / "hf", dtype=torch.bfloat16)
    original = load_file(hf / "model.safetensors")
    change_weights(hf, lambda tensors: tensors.update({name: tensors[name].to(to) for name in changed}))
    assert verify_after(hf, tmp_path / "bf16", "bf16").ok
    megatron_to_hf(tmp_path / "bf16", hf, tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    stored = load_file(hf / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(tensor, stored[name].to(torch.bfloat16)) for name, tensor in exported.items())
    if changed[0].startswith("lm_head"):  # One Megatron tensor each, so that both keep a dtype of their own.
        assert verify_after(hf, tmp_path / "kept", None).ok
        return
    with pytest.raises(CheckpointError) as caught:
        hf_to_megatron(hf, tmp_path / "kept")
    assert "mixed dtypes for decoder.layers" in str(caught.value)
    assert "remedy: --dtype bf16 (or fp16, fp32) converts all weights to one dtype; nothing" in str(caught.value)
    assert "config.json belongs" not in str(caught.value)


def verify_after(hf, megatron, dtype):
    hf_to_megatron(hf, megatron, dtype=dtype)
    return verify(hf, megatron, compare_logits=False)


def test_a_tied_copy_of_another_dtype_is_compared_after_the_conversion(tmp_path):
    hf = save_tiny_model("qwen2_tied", tmp_path / "hf", dtype=torch.bfloat16)
    copy = {"lm_head.weight": load_file(hf / "model.safetensors")["model.embed_tokens.weight"].float()}
    change_weights(hf, lambda tensors: tensors.update(copy))
    hf_to_megatron(hf, tmp_path / "same", dtype="bf16")
    copy["lm_head.weight"][5, 5] += 1
    change_weights(hf, lambda tensors: tensors.update(copy))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        hf_to_megatron(hf, tmp_path / "other", dtype="bf16")
    change_weights(hf, lambda tensors: tensors.update({"lm_head.weight": copy["lm_head.weight"].double()}))
    with pytest.raises(CheckpointError, match=r"dtype of lm_head\.weight is F64"):
        hf_to_megatron(hf, tmp_path / "other", dtype="bf16")


def test_single_file_and_shards_in_one_folder_are_two_models(tmp_path):
    single = save_tiny_model("qwen2", tmp_path / "single", seed=1)
    shards = save_tiny_model("qwen2", tmp_path / "shards", max_shard_size="100KB")
    index = "model.safetensors.index.json"
    shutil.copy(single / "model.safetensors", shards)
    for convert in (plan, lambda hf: hf_to_megatron(hf, tmp_path / "megatron")):
        with pytest.raises(
            CheckpointError, match=rf"two models lie in this folder.*got model\.safetensors and {index}"
        ):
            convert(shards)
    (shards / index).unlink()
    with pytest.raises(CheckpointError, match=r"two models.*got model\.safetensors and model-00001-of-"):
        plan(shards)
    assert not (tmp_path / "megatron").exists()
    # An index that names the single file and nothing else is the same model.
    names = dict.fromkeys(load_file(single / "model.safetensors"), "model.safetensors")
    (single / index).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert plan(single).num_parameters
    # A third file may lie beside either form: no reader takes it for the model.
    shutil.copy(single / "model.safetensors", single / "consolidated.safetensors")
    assert plan(single).num_parameters


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path):
    hf = save_tiny_model("qwen2", tmp_path / "hf")
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot be read \(Is a directory\)"):
        plan(hf)


@pytest.mark.parametrize(
    "fields",
    [
        {"_model_name_or_path": "x/y", "_name_or_path": "z", "name_or_path": "z"},
        {"unk_token_id": 0, "cls_token_id": 1, "mask_token_id": 2, "sep_token_id": None},
        {"pad_token": "<pad>", "eos_token": "</s>", "model_max_length": 4096, "padding_side": "left"},
    ],
)
def test_names_paths_and_token_ids_change_nothing(fields, tmp_path):
    hf = save_tiny_model("qwen2", tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "megatron")
    change_config(hf, **fields)
    assert verify(hf, tmp_path / "megatron", compare_logits=False).ok
