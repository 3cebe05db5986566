"""OpenThoughts3's math part as trajectory groups: the data of the offline GRPO release, as far as it is published."""

from megatron_offgrpo.data_config import FilterConfig, PrepareConfig


def openthoughts3_math() -> PrepareConfig:
    """16 QwQ-32B answers a problem, majority labels, 8 of 16 in the released order, filters.

    Published: the source, 16 answers a problem, the majority vote, K = 8 in the order right, wrong, ..., prompts of at
    most 1024 and responses of at most 31744 tokens. Not published, and chosen here: the filters.
    """
    return PrepareConfig(
        inputs=("hf:open-thoughts/OpenThoughts3-1.2M",),
        format="sharegpt",
        where=("domain=math",),
        labels=("majority",),
        select="released",
        trajectories_per_group=8,
        max_prompt_tokens=1024,
        max_response_tokens=31744,
        filters=FilterConfig(
            min_trajectories=4,
            duplicate_trajectories=True,
            duplicate_problems=True,
            near_duplicates=0.8,
            max_foreign_share=0.1,
            max_compression_ratio=12.0,
        ),
    )
