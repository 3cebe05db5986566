"""The sizes of a dense or mixture-of-experts GPT with GQA and SwiGLU, and its parameter counts, exact."""

from dataclasses import dataclass

VOCAB_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this times tp: Megatron-LM's make_vocab_size_divisible_by."""


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding under tensor parallelism: the next multiple of 128 tp, as in Megatron-LM."""
    multiple = VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True)
class ModelShape:
    """The sizes that parameters, FLOPs and memory depend on."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Of a dense layer, or of one expert where num_experts > 0."""
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    """0: dense."""
    experts_per_token: int = 0

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return 2 * self.num_query_groups * self.head_dim

    @property
    def attention_matrices(self) -> int:
        """Parameters of one layer's QKV and output projections."""
        return self.hidden_size * (2 * self.query_size + self.key_value_size)

    @property
    def mlp_matrices(self) -> int:
        """Parameters of one dense SwiGLU MLP, or of one expert: gate, up and down."""
        return 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def qkv_biases(self) -> int:
        """Of one layer."""
        return self.query_size + self.key_value_size if self.qkv_bias else 0

    @property
    def norm_vectors(self) -> int:
        """Parameters of one layer's norms, those of queries and keys included."""
        return 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def router(self) -> int:
        """Parameters of one layer's router."""
        return self.hidden_size * self.num_experts

    @property
    def embedding(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All parameters, exact."""
        layer = self.attention_matrices + self.qkv_biases + self.norm_vectors + self.router
        layer += self.mlp_matrices * max(1, self.num_experts)
        return self.num_layers * layer + self.hidden_size + self.embedding * (1 if self.tied_embeddings else 2)

    @property
    def matmul_parameters_per_token(self) -> int:
        """Parameters of the matrices that one token passes in the layers, without embedding and head."""
        active = self.experts_per_token if self.num_experts else 1
        return self.num_layers * (self.attention_matrices + self.router + active * self.mlp_matrices)

    def embedding_rows(self, tp: int) -> int:
        """Rows of the embedding on one tensor-parallel rank, padding included."""
        return padded_vocab_size(self.vocab_size, tp) // tp
