"""Where the time of a step goes."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any


class StageClock:
    """Seconds by stage; each moment since the start belongs to exactly one stage, so that they add up."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def ends(self, stage: str) -> None:
        """The time since the last end was the stage's."""
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now

    def timed(self, stage: str, function: Callable[[Any], Any], *, within: str) -> Callable[[Any], Any]:
        """The function; its calls count as `stage`, the time before each of them as `within`."""

        def call(argument: Any) -> Any:
            self.ends(within)
            result = function(argument)
            self.ends(stage)
            return result

        return call
