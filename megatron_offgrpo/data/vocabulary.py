"""Token ids beyond a model's vocabulary: Megatron pads its embedding, and would train on rows that are no token's."""

import json
from pathlib import Path

from megatron_offgrpo.errors import DataError


def vocabulary_of(folder: str | Path) -> int | None:
    """`vocab_size` of the model in a Hugging Face folder; None where config.json is not there or names none."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as cause:
        raise DataError(f"unreadable config.json ({cause})", where=str(folder)) from None
    size = config.get("vocab_size") if isinstance(config, dict) else None
    return size if isinstance(size, int) else None


def require_known_ids(largest: int, vocabulary: int | None, model: str | Path, *, where: str) -> None:
    """Refuses token ids that the model has no embedding for.

    Args:
        largest: of the ids.
        vocabulary: number of the model's tokens; None where it is not known.
        model: folder of the model.
        where: what holds the ids.

    Raises:
        DataError: the largest id is at or beyond the vocabulary.
    """
    if vocabulary is not None and largest >= vocabulary:
        raise DataError(
            "token ids beyond the model's vocabulary",
            where=where,
            expected=f"ids below {vocabulary} (vocab_size of {model})",
            got=largest,
            remedy="take the tokenizer that belongs to this model, or give the model rows for the added tokens: "
            "model.resize_token_embeddings(len(tokenizer)), saved in a new folder",
        )
