"""How large a study is and where it lies."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le

from megatron_offgrpo.artifacts import fingerprint_of
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.ranges import Count, Natural, Ranged
from recipes.study import MAX_RESPONSE_TOKENS
from tools.study.models import ModelSize

SWEEP_SEED = 1000
"""Not a seed of the study."""
TEMPERATURES = ((0.0, 1.0, 1), (0.6, 0.95, 4), (1.0, 1.0, 4))
"""(temperature, top-p, samples a problem) on the test problems."""
DEFAULT_SIZE = ModelSize()
MAX_TOKENS = MAX_RESPONSE_TOKENS


@dataclass(frozen=True)
class StudySettings(Ranged):
    """Sizes; everything that a result depends on beside the arm, the learning rate and the seed."""

    root: Path
    groups: Count = 256
    """Training problems of the core study."""
    pool: Count = 512
    """Training problems with teacher solutions, from which the groups are taken."""
    all_positive_percent: Annotated[int, Ge(0), Le(100)] | None = 75
    """Share of all-positive groups in the core study; None takes the first `groups` as they are."""
    solutions: Count = 8
    test: Count = 200
    skills: Count = 100
    validation: Count = 120
    validation_skills: Count = 60
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    extensions: Natural = 2
    """Rates tried beyond an end of the grid, where the best one stands there."""
    size: ModelSize = DEFAULT_SIZE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups > self.pool:
            raise ConfigError("more groups than problems", where="groups", expected=f"<= {self.pool}", got=self.groups)
        if not self.seeds or SWEEP_SEED in self.seeds:
            raise ConfigError("no usable seeds", where="seeds", expected=f"some, without {SWEEP_SEED}", got=self.seeds)

    @property
    def shared(self) -> Path:
        """Folder of what all runs share."""
        return self.root / "shared"

    @property
    def run_key(self) -> str:
        """Fingerprint of what every run depends on; seeds and the grid only say which runs there are."""
        values: dict[str, Any] = asdict(self)
        for name in ("root", "seeds", "lrs", "extensions"):
            del values[name]
        return fingerprint_of(values, TEMPERATURES, MAX_TOKENS)
