"""Runs in `.venv-bridge`: what Megatron-Bridge makes of tiny models and of this project's checkpoints of them.

usage: python -m tests.bridge.worker FOLDER; FOLDER/NAME has `hf` and `megatron`, and gets what is described below.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_offgrpo.config import LayoutConfig
from megatron_offgrpo.parallel import runtime

# Fused and grouped kernels need CUDA, and compute the same.
KERNELS = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "cross_entropy_loss_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "persist_layer_norm",
)


def without_kernels(config: Any) -> None:
    for name in KERNELS:
        setattr(config, name, False)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[1, tokens, rows of the vocabulary]."""
    with torch.no_grad():
        return model.eval()(ids, torch.arange(ids.shape[1])[None], attention_mask=None)


def settings_of(config: Any) -> dict[str, Any]:
    """What a configuration says, as JSON; functions by name."""
    names = [field.name for field in dataclasses.fields(config) if not field.name.startswith("_")]
    return {name: plain(getattr(config, name)) for name in names}


def plain(value: Any) -> Any:
    if isinstance(value, bool | int | float | str | None):
        return value
    return getattr(value, "__name__", None) or str(value)


def load_by_arguments(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Our checkpoint as one of Megatron-LM: the model is built from the arguments in it alone."""
    from megatron.bridge.training.model_load_save import build_and_load_model, load_model_config

    path = str(folder / "megatron" / "release")
    config, args = load_model_config(path)
    without_kernels(config)
    settings = settings_of(config) | {
        "vocab_size": args.vocab_size,
        "seq_length": args.max_position_embeddings,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
        "position_embedding_type": args.position_embedding_type,
        "rotary_base": args.rotary_base,
        "rotary_percent": args.rotary_percent,
        "rope_scaling": args.use_rope_scaling,
        "rope_scaling_factor": args.rope_scaling_factor,
        "seq_len_interpolation_factor": args.rotary_seq_len_interpolation_factor,
    }
    # The number of rows is asked of a tokenizer; this one has as many entries as `vocab_size` says.
    args.tokenizer_type = "NullTokenizer"
    (model,) = build_and_load_model(path, config, "gpt", args, use_cpu_init=True)
    return model, settings


def build(bridge: Any, *, load_weights: bool) -> tuple[list[Any], dict[str, Any]]:
    """The model that Bridge builds from config.json, with the weights beside it or none."""
    provider = bridge.to_megatron_provider(load_weights=load_weights)
    without_kernels(provider)
    provider.finalize()
    settings = settings_of(provider)
    return provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True), settings


def export(bridge: Any, checkpoint: Path, output: Path, strictness: str = "assume_ok_unexpected") -> tuple[Any, dict]:
    """Our checkpoint in the model that Bridge builds, and that model as a Hugging Face folder."""
    from megatron.bridge.training.checkpointing import _load_model_weights_from_checkpoint

    model, settings = build(bridge, load_weights=False)
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.fill_(float("nan"))
    _load_model_weights_from_checkpoint(str(checkpoint), model, dist_ckpt_strictness=strictness)
    bridge.save_hf_pretrained(model, output, show_progress=False)
    return model[0], settings


def examine(folder: Path, ids: torch.Tensor) -> dict[str, Any]:
    """Writes for one model, where Bridge has its family:

    logits.pt: of our checkpoint, in the model that its arguments describe and in the one that Bridge builds;
    bridge_megatron: Bridge's own checkpoint of `hf`; bridge_hf: its export of our checkpoint.

    Returns:
        The settings of both models, and whether Bridge has the family.
    """
    from megatron.bridge import AutoBridge

    model, settings = load_by_arguments(folder)
    logits = {"by_arguments": logits_of(model, ids)}
    found = {"by_arguments": settings, "supported": AutoBridge.can_handle(folder / "hf")}
    if found["supported"]:
        bridge = AutoBridge.from_hf_pretrained(folder / "hf")
        imported, _ = build(bridge, load_weights=True)
        bridge.save_megatron_model(imported, folder / "bridge_megatron")
        model, found["by_bridge"] = export(bridge, folder / "megatron" / "release", folder / "bridge_hf")
        logits["by_bridge"] = logits_of(model, ids)
    torch.save(logits, folder / "logits.pt")
    return found


def main(folder: Path) -> None:
    """Examines each model in the folder, and exports `trained`; the ids are in `ids.pt`."""
    runtime.start(LayoutConfig(), seed=0)
    from megatron.bridge import AutoBridge

    ids = torch.load(folder / "ids.pt")
    models = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name != "trained"]
    found = {path.name: examine(path, ids) for path in models}
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    trained = folder / "trained"
    (checkpoint,) = (trained / "train" / "checkpoints").glob("iter_*")
    # Training leaves out the empty objects that Megatron's layers ask for; Bridge's default is to refuse that.
    export(AutoBridge.from_hf_pretrained(trained / "hf"), checkpoint, trained / "bridge_hf", "log_unexpected")
    runtime.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
