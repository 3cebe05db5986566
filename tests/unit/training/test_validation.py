"""Which validation value makes a best checkpoint."""

from math import inf, nan

import pytest

from megatron_offgrpo.config import with_values
from megatron_offgrpo.training.validation import is_better
from tests.distributed.toy import toy_run


@pytest.mark.parametrize(
    ("best", "value", "before", "expected"),
    [
        ("highest", 1.0, None, True),
        ("highest", 2.0, 1.0, True),
        ("highest", 1.0, 1.0, False),
        ("lowest", 0.5, 1.0, True),
        ("highest", nan, None, False),
        ("highest", inf, 1.0, False),
        ("lowest", -inf, 1.0, False),
        ("lowest", 1.0, nan, True),
    ],
)
def test_only_a_finite_and_better_value(best, value, before, expected):
    run = with_values(toy_run(), validation={"metric": "kl", "best": best})
    assert is_better({"validation_kl": value}, before, run) is expected
