import pytest

from megatron_offgrpo.data.grading import GradingPool
from tests.unit.data.tiny import save_tokenizer


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def pool():
    with GradingPool(processes=1) as one:
        yield one
