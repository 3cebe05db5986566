"""OpenThinker2-7B with the settings of the offline GRPO release; the same sizes as OpenThinker3-7B."""

from dataclasses import replace

from megatron_offgrpo.config import RunConfig
from recipes.openthinker3 import openthinker3_7b, openthinker3_7b_blog
from recipes.paths import run_paths


def openthinker2_7b() -> RunConfig:
    """The released settings; 8 x 80 GB."""
    return replace(openthinker3_7b(), name="openthinker2_7b", paths=run_paths("openthinker2_7b", "OpenThinker2-7B"))


def openthinker2_7b_blog() -> RunConfig:
    """The settings of the accompanying text; 8 x 80 GB."""
    base = openthinker3_7b_blog()
    return replace(base, name="openthinker2_7b_blog", paths=run_paths("openthinker2_7b", "OpenThinker2-7B"))
