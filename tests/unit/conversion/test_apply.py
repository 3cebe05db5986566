"""Converting: bit-identical round trips, files carried along, atomic, strict about what it reads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoints_conversion import apply, changed_weights, hf_to_megatron, megatron_to_hf
from checkpoints_conversion.fingerprints import WeightsFingerprint
from checkpoints_conversion.hf_reader import HfWeights
from checkpoints_conversion.hf_writer import parse_size
from checkpoints_conversion.safe_metadata import read_common
from megatron_offgrpo.artifacts import read_manifest
from megatron_offgrpo.data.store import tokenizer_fingerprint
from megatron_offgrpo.errors import CheckpointError, ConfigError, OffgrpoError
from tests.unit.conversion.tiny_models import MODELS, save_tiny_model

ALL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors_of(folder) -> dict[str, torch.Tensor]:
    weights = HfWeights(folder)
    assert not weights.problems
    return {name: weights.load(name) for name in weights.tensors}


def assert_identical(a, b) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.mark.parametrize("name", list(MODELS))
def test_round_trip_is_bit_identical(name, tmp_path):
    # Each family in one dtype, so that each dtype and each family is seen.
    dtype = ALL_DTYPES[list(MODELS).index(name) % 3]
    hf = save_tiny_model(name, tmp_path / "hf", dtype=dtype)
    there = hf_to_megatron(hf, tmp_path / "megatron")
    back = megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "out")
    assert_identical(load_file(hf / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors"))
    assert there.fingerprint == there.inputs["hf"] == back.fingerprint
    assert back.inputs == {"megatron": there.fingerprint}
    assert changed_weights(hf, tmp_path / "out") == 0.0


def test_shards_an_index_and_special_values(tmp_path):
    hf = save_tiny_model("qwen2", tmp_path / "hf", dtype=torch.bfloat16)
    weights = load_file(hf / "model.safetensors")
    # NaN with a payload, -0.0, inf and a denormal must come back with the same bits.
    weights["model.norm.weight"][:4] = (
        torch.tensor([0x7FC1, -0x8000, 0x7F80, 0x0001]).to(torch.int16).view(torch.bfloat16)
    )
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "out", max_shard_size="50KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        content = load_file(tmp_path / "out" / file)
        assert sum(t.nbytes for t in content.values()) <= 50_000
        assert set(content) == {name for name, place in index["weight_map"].items() if place == file}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights.values())
    assert_identical(weights, tensors_of(tmp_path / "out"))
    # From shards back: the same weights have the same fingerprint.
    again = hf_to_megatron(tmp_path / "out", tmp_path / "again")
    assert again.fingerprint == read_manifest(tmp_path / "megatron" / "release", "checkpoint", remedy="").fingerprint


def test_dtype_option_casts_once_and_is_written_into_the_config(tmp_path):
    hf = save_tiny_model("llama3_tied", tmp_path / "hf")
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(hf / "model.safetensors").items()}
    manifest = hf_to_megatron(hf, tmp_path / "megatron", dtype="bf16")
    assert manifest.fingerprint != manifest.inputs["hf"]
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "bf16", dtype="bf16")
    assert_identical(expected, tensors_of(tmp_path / "bf16"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto").dtype == torch.bfloat16
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "fp32", dtype="fp32")
    assert_identical({name: tensor.float() for name, tensor in expected.items()}, tensors_of(tmp_path / "fp32"))
    with pytest.raises(ConfigError, match="expected bf16 or fp16 or fp32; got int8"):
        hf_to_megatron(hf, tmp_path / "other", dtype="int8")


def test_config_tokenizer_and_chat_template_are_carried_along_and_weights_are_not(tmp_path):
    hf = save_tiny_model("qwen2", tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (hf / name).write_text(json.dumps({"content": name}))
    for name in ("chat_template.jinja", "merges.txt", "LICENSE"):
        (hf / name).write_text(f"content of {name}")
    for name in ("pytorch_model.bin", "modeling_x.py", "optimizer.pt"):
        (hf / name).write_text("no")
    manifest = hf_to_megatron(hf, tmp_path / "megatron")
    assert manifest.inputs["tokenizer"] == tokenizer_fingerprint(hf)
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "out")
    carried = {path.name for path in (tmp_path / "out").iterdir()}
    assert carried == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("merges.txt", "LICENSE", "model.safetensors", "manifest.json"),
    }
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "content of chat_template.jinja"
    assert (tmp_path / "out" / "config.json").read_bytes() == (hf / "config.json").read_bytes()


def test_common_file_has_what_megatron_lm_asks_for(tmp_path):
    hf_to_megatron(save_tiny_model("qwen3_moe", tmp_path / "hf"), tmp_path / "megatron")
    common = read_common(tmp_path / "megatron" / "release")
    args = common["args"]
    assert common["checkpoint_version"] == 3.0
    assert (args.num_layers, args.kv_channels, args.num_query_groups, args.qk_layernorm) == (4, 20, 2, True)
    assert (args.num_experts, args.moe_ffn_hidden_size, args.moe_router_pre_softmax) == (4, 40, False)
    assert (args.untie_embeddings_and_output_weights, args.tensor_model_parallel_size) == (True, 1)
    # What other tools that read it this way would see.
    torch.load(tmp_path / "megatron" / "release" / "common.pt", weights_only=True)


def test_pickled_weights_are_refused_with_the_remedy(tmp_path):
    hf = save_tiny_model("qwen2", tmp_path / "hf")
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled weights are not read.*save_pretrained"):
        hf_to_megatron(hf, tmp_path / "megatron")


def test_truncated_safetensors_are_noticed_before_anything_is_written(tmp_path):
    hf = save_tiny_model("qwen2", tmp_path / "hf")
    path = hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"truncated or unreadable safetensors file.*download"):
        hf_to_megatron(hf, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_truncated_megatron_checkpoint(tmp_path):
    hf = save_tiny_model("qwen2", tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "megatron")
    data = tmp_path / "megatron" / "release" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated checkpoint"):
        megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_models_template_lists_every_mismatch(tmp_path):
    hf_to_megatron(save_tiny_model("qwen2", tmp_path / "a"), tmp_path / "megatron")
    other = save_tiny_model("qwen3", tmp_path / "b")
    with pytest.raises(CheckpointError) as caught:
        megatron_to_hf(tmp_path / "megatron", other, tmp_path / "out")
    message = str(caught.value)
    assert "missing decoder.layers.self_attention.q_layernorm.weight" in message
    assert "unexpected decoder.layers.self_attention.linear_qkv.bias" in message
    assert "unexpected output_layer.weight" in message
    # Qwen3's 20 instead of 12 rows per head: 8 heads' worth of rows, 4 layers.
    assert "linear_qkv.weight: expected [4, 160, 48], got [4, 96, 48]" in message
    assert not (tmp_path / "out").exists()


def test_existing_targets_need_overwrite(tmp_path):
    hf = save_tiny_model("qwen2", tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "megatron")
    with pytest.raises(CheckpointError, match="already exists"):
        hf_to_megatron(hf, tmp_path / "megatron")
    other = save_tiny_model("qwen2", tmp_path / "hf2", seed=1)
    new = hf_to_megatron(other, tmp_path / "megatron", overwrite=True)
    assert read_manifest(tmp_path / "megatron" / "release", "checkpoint", remedy="").fingerprint == new.fingerprint
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "out")
    with pytest.raises(CheckpointError, match="already exists"):
        megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "out")


def test_a_trained_checkpoint_is_never_overwritten_by_a_converted_one(tmp_path):
    hf = save_tiny_model("qwen2", tmp_path / "hf")
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").write_text("10\n")
    with pytest.raises(CheckpointError, match="holds a trained checkpoint"):
        hf_to_megatron(hf, tmp_path / "megatron", overwrite=True)


def test_what_fails_or_is_killed_midway_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    hf = save_tiny_model("qwen2", tmp_path / "hf")
    loads = []

    def failing_load(self, name, *rows):
        loads.append(name)
        if len(loads) == 20:
            raise OSError("No space left on device")
        return original(self, name, *rows)

    original = HfWeights.load
    monkeypatch.setattr(HfWeights, "load", failing_load)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device"):
        hf_to_megatron(hf, tmp_path / "megatron")
    assert list((tmp_path / "megatron").iterdir()) == []
    monkeypatch.undo()
    # A killed conversion cannot clean up: its hidden folder stays, and goes when the conversion runs again.
    killed = tmp_path / "megatron" / ".release.abc.tmp"
    killed.mkdir()
    (killed / "__0_0.distcp").write_text("half")
    with pytest.raises(CheckpointError, match="not a Megatron checkpoint folder"):
        megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "out")
    hf_to_megatron(hf, tmp_path / "megatron")
    names = sorted(path.name for path in (tmp_path / "megatron").iterdir())
    assert names == ["latest_checkpointed_iteration.txt", "release"]


def test_two_conversions_into_one_folder_do_not_mix(tmp_path):
    hf = save_tiny_model("qwen2", tmp_path / "hf")
    with (
        apply._only_writer(tmp_path / "megatron" / "release", overwrite=False),
        pytest.raises(CheckpointError, match="another conversion is writing"),
    ):
        hf_to_megatron(hf, tmp_path / "megatron")


def test_iterations_are_found_by_number(tmp_path):
    hf = save_tiny_model("qwen2", tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "megatron")
    shutil.move(tmp_path / "megatron" / "release", tmp_path / "megatron" / "iter_0000010")
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").write_text("10")
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "latest")
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "ten", iteration=10)
    assert changed_weights(tmp_path / "latest", tmp_path / "ten") == 0.0
    with pytest.raises(CheckpointError, match="expected iter_0000020; got iter_0000010"):
        megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "twenty", iteration=20)


def test_share_of_changed_bf16_weights(tmp_path):
    hf = save_tiny_model("llama_linear_rope", tmp_path / "a")
    weights = load_file(hf / "model.safetensors")
    total = sum(tensor.numel() for tensor in weights.values())
    shutil.copytree(hf, tmp_path / "b")
    norm = weights["model.norm.weight"]
    norm[:] = 1.0
    save_file(weights, hf / "model.safetensors")
    # bf16 has 8 bits of precision: at 1.0 its steps are 2^-7, so that 1 + 2^-9 rounds back and 1 + 2^-7 does not.
    norm[0], norm[1], norm[2] = 1 + 2**-9, 1 + 2**-7, 1 - 2**-8
    save_file(weights, tmp_path / "b" / "model.safetensors")
    assert changed_weights(hf, tmp_path / "b") == 2 / total
    with pytest.raises(CheckpointError, match=r"different architectures:\n  model_type: llama and qwen2\n"):
        changed_weights(hf, save_tiny_model("qwen2", tmp_path / "c"))


def test_fingerprint_sees_names_dtypes_shapes_and_bytes_but_not_order():
    def of(*items):
        fingerprint = WeightsFingerprint()
        for name, tensor in items:
            fingerprint.add(name, tensor)
        return fingerprint.result()

    a, b = ("a", torch.tensor([1.0, 2.0])), ("b", torch.tensor([3.0]))
    assert of(a, b) == of(b, a)
    others = [
        of(a, ("c", b[1])),
        of(a, ("b", torch.tensor([4.0]))),
        of(a, ("b", torch.tensor([[3.0]]))),
        of(a, ("b", b[1].view(torch.int32))),
        of(a),
    ]
    assert len({of(a, b), *others}) == 6


def test_sizes():
    assert (parse_size("5GB"), parse_size("1.5 MiB"), parse_size("10kb")) == (5 * 10**9, 3 * 2**19, 10_000)
    for text in ("", "5 apples", "0GB", "-1GB"):
        with pytest.raises(OffgrpoError, match="max-shard-size"):
            parse_size(text)
