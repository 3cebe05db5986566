"""The verdict on nodes, and the measurements of one without a cluster."""

import json
from dataclasses import asdict

import pytest

from megatron_offgrpo import node_check
from megatron_offgrpo.node_check import NodeResult, read_results, table_lines


def write(folder, **values):
    result = NodeResult(**values)
    (folder / f"{result.node}.json").write_text(json.dumps(asdict(result)))


def test_pairs_meet_in_two_rounds():
    """Nodes 0-1 and 2-3 meet first, then 1-2 and 3-4."""
    assert [node_check._pairs(number, 5) for number in range(5)] == [[0], [0, 1], [2, 1], [2, 3], [3]]
    assert node_check._pairs(0, 1) == []


def test_silent_slow_and_different_nodes_are_bad(tmp_path):
    for name, rate, doctor in (("a", 100.0, ["x 1"]), ("b", 90.0, ["x 1"]), ("c", 40.0, ["x 1"]), ("d", 95.0, ["x 2"])):
        write(tmp_path, node=name, within_gbps=rate, storage_mbps=500.0, doctor=doctor)
    results = read_results(tmp_path, ["a", "b", "c", "d", "e"])
    # The median of 40, 90, 95, 100 (upper of the two in the middle) is 95; half of it is 47.5.
    assert [bool(result.reasons) for result in results] == [False, False, True, True, True]
    assert results[2].reasons == ["all-reduce: 40, median of the nodes 95"]
    assert "x 2" in results[3].reasons[0]
    lines = table_lines(results)
    assert lines[1].split()[:3] == ["a", "ok", "100"]
    assert lines[-2:] == ["2 of 5 nodes are good", "leave out the others: sbatch --exclude=c,d,e ..."]


def test_a_node_is_not_blamed_for_its_neighbours(tmp_path):
    """b is silent, so a, which reaches nobody, is not to blame; c reaches d; e and f reach nobody."""
    write(tmp_path, node="a", links={"1": "no answer"})
    write(tmp_path, node="c", links={"1": "no answer", "3": 20.0})
    write(tmp_path, node="d", links={"2": 20.0, "4": "no answer"})
    write(tmp_path, node="e", links={"3": "no answer", "5": "no answer"})
    write(tmp_path, node="f", links={"4": "no answer"})
    results = read_results(tmp_path, list("abcdef"))
    assert [result.node for result in results if result.reasons] == ["b", "e", "f"]
    assert [result.between_gbps for result in results] == [None, None, 20.0, 20.0, None, None]


def test_storage_that_cannot_be_written_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(node_check, "STORAGE_MEBIBYTES", 4)
    reasons = []
    assert node_check._storage(tmp_path / "file", reasons) > 0
    assert reasons == []
    assert not list(tmp_path.iterdir())
    assert node_check._storage(tmp_path / "absent" / "file", reasons) is None
    assert "No such file" in reasons[0]


def test_a_rank_that_never_comes_is_a_reason(monkeypatch):
    monkeypatch.setattr(node_check, "LIMIT_SECONDS", 1)
    reasons = []
    lonely = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    assert node_check._all_reduce([lonely], "with node 1", reasons) is None
    assert reasons == ["all-reduce with node 1: no answer within 1 s"]


@pytest.mark.parametrize("missing", [True, False])
def test_missing_packages_are_a_reason(monkeypatch, missing):
    from megatron_offgrpo import doctor

    monkeypatch.setattr(doctor, "lines", lambda: ["  torch    MISSING: make install" if missing else "  torch    2.13"])
    reasons = []
    node_check._doctor(reasons)
    assert reasons == (["doctor: torch MISSING: make install"] if missing else [])
