"""Which layouts a model's sizes divide over."""

from megatron_offgrpo.config import FP8_MULTIPLE, LayoutConfig, ModelConfig
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.planning.shape import ModelShape


def check_divides(shape: ModelShape, layout: LayoutConfig, model: ModelConfig) -> None:
    """Refuses a layout over which the model's sizes do not divide, or whose parts fp8 cannot multiply.

    Raises:
        ConfigError: naming the field.
    """
    expert_tp = 1 if layout.ep > 1 else layout.tp  # With expert parallelism an expert is never split.
    for field, size, by, value in (
        ("layout.tp", "attention heads", layout.tp, shape.num_attention_heads),
        ("layout.tp", "key-value heads", layout.tp, shape.num_query_groups),
        ("layout.tp", "feed-forward width", expert_tp, shape.ffn_hidden_size),
        ("layout.pp", "layers", layout.pp * layout.vpp, shape.num_layers),
        ("layout.ep", "experts", layout.ep, shape.num_experts),
    ):
        if by > 1 and (value % by or not value):
            raise ConfigError(
                f"does not divide the model's {size}", where=field, expected=f"a divisor of {value}", got=by
            )
    if shape.num_experts and layout.tp > 1 and not layout.sequence_parallel:
        raise ConfigError(
            "a mixture of experts under tensor parallelism divides the sequence as well, as Megatron-Core wants it",
            where="layout.sequence_parallel",
            expected="true",
            got="false",
            remedy="--set layout.sequence_parallel=true",
        )
    if model.precision == "fp8":
        _check_fp8(shape, layout.tp, expert_tp)


def _check_fp8(shape: ModelShape, tp: int, expert_tp: int) -> None:
    sizes = {
        "the hidden size": shape.hidden_size,
        "queries / tp": shape.query_size // tp,
        "queries, keys and values / tp": (shape.query_size + shape.key_value_size) // tp,
        "the feed-forward width / tp": shape.ffn_hidden_size // expert_tp,
    }
    for name, size in sizes.items():
        if size % FP8_MULTIPLE:
            raise ConfigError(
                f"{name} cannot be multiplied in fp8",
                where="model.precision",
                expected=f"a multiple of {FP8_MULTIPLE}",
                got=size,
                remedy="a smaller layout.tp, or --set model.precision=bf16",
            )
