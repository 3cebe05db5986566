"""The reference log-probs on disk: what comes from elsewhere is refused, not run."""

import pickle

import numpy as np
import pytest

from megatron_offgrpo.errors import DataError
from megatron_offgrpo.training.reference_cache import LOGPROBS_FILE, inputs_of, open_reference, write_reference
from tests.distributed.toy import architecture, write_toy_store
from tests.evil import Evil


@pytest.mark.parametrize("form", ["object array", "plain pickle"])
def test_pickled_objects_are_refused_and_not_read(tmp_path, form):
    store = write_toy_store(tmp_path / "store", num_groups=1)
    inputs = inputs_of(store, "weights", "fp32", architecture("qwen2"))
    write_reference(tmp_path / "reference", np.zeros(int(store.response_lengths.sum()), np.float32), inputs, {})
    assert open_reference(tmp_path / "reference", store, inputs, remedy="offgrpo reference toy").lookup(0).tolist()
    file, evil = tmp_path / "reference" / LOGPROBS_FILE, Evil(tmp_path / "ran")
    if form == "plain pickle":
        file.write_bytes(pickle.dumps(evil))
    else:
        np.save(file, np.array([evil], dtype=object))
    with pytest.raises(DataError, match=r"logprobs\.npy: unreadable reference .*offgrpo reference toy") as caught:
        open_reference(tmp_path / "reference", store, inputs, remedy="offgrpo reference toy")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
