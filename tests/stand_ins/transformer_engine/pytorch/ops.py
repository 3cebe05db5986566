"""Attention over whole sequences; and classes that Megatron derives from or names, of which none is built here."""

import torch
from torch import Tensor


class DotProductAttention(torch.nn.Module):
    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None,
        sequence_parallel=False,
        tp_size=1,
        get_rng_state_tracker=None,
        tp_group=None,
        layer_number=None,
        attention_type="self",
        softmax_scale=None,
    ):
        super().__init__()
        assert attention_dropout == 0.0
        assert (qkv_format, window_size, attention_type) == ("sbhd", None, "self")
        self.softmax_scale = softmax_scale

    def forward(self, query_layer, key_layer, value_layer, attention_mask=None, attn_mask_type=None) -> Tensor:
        """From and to [tokens, sequences, heads ...]; a causal mask needs no tensor."""
        assert attn_mask_type == "causal"
        parts = (part.permute(1, 2, 0, 3) for part in (query_layer, key_layer, value_layer))
        out = torch.nn.functional.scaled_dot_product_attention(
            *parts, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)


class GroupedLinear(torch.nn.Module): ...


class LayerNorm(torch.nn.Module): ...


class Sequential: ...


class FusibleOperation: ...
