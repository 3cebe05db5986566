"""Families that this project's layer cannot express, and why: a clear refusal instead of a wrong model."""

REASONS: dict[str, str] = {
    "gemma2": "attention scores and final logits are soft-capped (attn_logit_softcapping, final_logit_softcapping), "
    "sliding-window and full attention alternate, every sublayer has a norm before and after it, and embeddings are "
    "scaled by sqrt(hidden_size); Megatron-Core has no soft-capping and no norm after a sublayer",
    "olmo2": "the norms stand after each sublayer, and those of queries and keys run over all heads at once; "
    "Megatron-Core norms before a sublayer, and queries and keys head by head",
}
