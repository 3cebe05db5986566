"""The command line: exit statuses and what is printed."""

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from checkpoints_conversion import cli
from tests.unit.conversion.tiny_models import save_tiny_model

runner = CliRunner()


def run(*arguments):
    return runner.invoke(cli.app, [str(argument) for argument in arguments])


def test_all_commands_in_a_row(tmp_path):
    hf, megatron = save_tiny_model("qwen3", tmp_path / "hf"), tmp_path / "megatron"
    assert "family qwen3" in run("plan", "--hf", hf).output
    assert not megatron.exists()
    assert run("hf-to-megatron", "--hf", hf, "--megatron", megatron).exit_code == 0
    result = run("verify", "--hf", hf, "--megatron", megatron, "--no-logits")
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "equal")
    result = run("megatron-to-hf", "--hf", hf, "--megatron", megatron, "--output", tmp_path / "out")
    assert result.exit_code == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_verify_names_what_differs_and_exits_1(tmp_path):
    hf, megatron = save_tiny_model("qwen2", tmp_path / "hf"), tmp_path / "megatron"
    run("hf-to-megatron", "--hf", hf, "--megatron", megatron)
    weights = load_file(hf / "model.safetensors")
    name = "model.layers.2.self_attn.v_proj.weight"
    weights[name][3, 4] += 0.5
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    result = run("verify", "--hf", hf, "--megatron", megatron)
    assert result.exit_code == 1
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert f"differs: {name}: 1 of 1152 values, by at most 0.5" in lines
    # Layers 0 and 1 come before the change, layer 2 is the first to differ.
    differences = {line.split(":")[0]: float(line.split(":")[1]) for line in lines if line.startswith("after layer")}
    assert differences["after layer 1"] < 1e-4 < differences["after layer 2"]
    assert lines[-1] == "NOT equal"


def test_a_users_mistake_is_one_line_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", "plan", "--hf", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "config.json" in error
