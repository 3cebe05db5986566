"""Lets Megatron-Bridge run where Transformer Engine cannot, on Megatron-Core's own "local" layers.

Nothing of Bridge that the tests look at is replaced: its reading of configurations, its mappings of weights, its
loading and its saving are its own, and it has names of its own for the local layers' norms
(`MegatronMappingRegistry._SEPARATE_LAYERNORM_REWRITES`).
"""

import sys
from collections.abc import Callable
from functools import wraps
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

LORA_LAYERS = "megatron.bridge.peft.lora_layers"
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


class _LoraLayersFinder:
    """Imports Bridge's LoRA layers, whose annotations name classes of Transformer Engine; no LoRA is used here.

    The stand-in is there for that one import: all else still finds that Transformer Engine is missing.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != LORA_LAYERS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def with_stand_in(module: ModuleType) -> None:
            stand_in = MagicMock()
            sys.modules |= {"transformer_engine": stand_in, "transformer_engine.pytorch": stand_in.pytorch}
            try:
                execute(module)
            finally:
                del sys.modules["transformer_engine"], sys.modules["transformer_engine.pytorch"]

        loader.exec_module = with_stand_in
        return spec


def import_bridge() -> None:
    """Imports `megatron.bridge` and mends one name of Megatron-Core's local layers."""
    # What the LoRA layers import of Megatron-Core is there before the stand-in is.
    import megatron.core.transformer.moe.moe_utils
    from megatron.core.models.gpt import gpt_layer_specs

    gpt_layer_specs.get_gpt_layer_local_submodules = _keep_norm_before_router(
        gpt_layer_specs.get_gpt_layer_local_submodules
    )
    sys.meta_path.insert(0, _LoraLayersFinder())  # type: ignore[arg-type]
    import megatron.bridge  # noqa: F401


def _keep_norm_before_router(make_submodules: Callable) -> Callable:
    """Megatron's local layer gives the norm before a router the key of a dense MLP's; Transformer Engine's does not."""

    @wraps(make_submodules)
    def make(num_experts: int | None = None, *args: Any, **kwargs: Any) -> Any:
        submodules = make_submodules(num_experts, *args, **kwargs)
        if num_experts:
            submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
        return submodules

    return make


def without_kernels(config: Any) -> None:
    """Switches fused and grouped kernels off: they need CUDA or Transformer Engine, and compute the same."""
    for name in KERNELS:
        setattr(config, name, False)
