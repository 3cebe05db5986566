"""AceReason-Nemotron-1.1-7B with the settings of the offline GRPO release; the same sizes as OpenThinker3-7B."""

from dataclasses import replace

from megatron_offgrpo.config import RunConfig
from recipes.openthinker3 import openthinker3_7b, openthinker3_7b_blog
from recipes.paths import run_paths
from recipes.sizes import on_80gb

_PATHS = run_paths("acereason_nemotron_1_1_7b", "AceReason-Nemotron-1.1-7B")


def acereason_nemotron_1_1_7b() -> RunConfig:
    """The released settings; 8 x 80 GB."""
    return replace(openthinker3_7b(), name="acereason_nemotron_1_1_7b", paths=_PATHS)


def acereason_nemotron_1_1_7b_32x80gb() -> RunConfig:
    """The released settings on four nodes."""
    return on_80gb(acereason_nemotron_1_1_7b(), 32, model={"recompute": "none"})


def acereason_nemotron_1_1_7b_64x80gb() -> RunConfig:
    """The released settings on eight nodes."""
    return on_80gb(acereason_nemotron_1_1_7b(), 64, model={"recompute": "none"})


def acereason_nemotron_1_1_7b_blog() -> RunConfig:
    """The settings of the accompanying text; 8 x 80 GB."""
    return replace(openthinker3_7b_blog(), name="acereason_nemotron_1_1_7b_blog", paths=_PATHS)


def acereason_nemotron_1_1_7b_blog_32x80gb() -> RunConfig:
    """The settings of the accompanying text on four nodes."""
    return on_80gb(acereason_nemotron_1_1_7b_blog(), 32, model={"recompute": "none"})


def acereason_nemotron_1_1_7b_blog_64x80gb() -> RunConfig:
    """The settings of the accompanying text on eight nodes."""
    return on_80gb(acereason_nemotron_1_1_7b_blog(), 64, model={"recompute": "none"})
