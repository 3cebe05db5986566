"""Why interleaved stages send overlapped messages; see the table of patches in docs/decisions.md."""

import json

from tests.distributed.harness import run_ranks
from tests.distributed.toy import write_toy_store


def test_batched_messages_of_interleaved_stages_arrive_swapped(tmp_path):
    """Where they give the same loss, `transformer_config` need not ask for the other form."""
    write_toy_store(tmp_path / "store")
    run_ranks("tests.distributed.p2p_worker:write_losses", 2, store=str(tmp_path / "store"), output=str(tmp_path))
    overlapped, batched = json.loads((tmp_path / "1.json").read_text())
    assert abs(overlapped - batched) > 1e-4 * abs(overlapped)
