"""What is decided over all parts: duplicates, all-positive share, validation split; on rows made by hand."""

import numpy as np
import pytest

from megatron_offgrpo.data.merge import (
    KEPT,
    NEAR_PROBLEM,
    SAME_ID,
    SAME_PROBLEM,
    TOO_MANY_POSITIVE,
    decide,
    read_rows,
)
from megatron_offgrpo.data.part_files import PartFolder
from megatron_offgrpo.data.part_worker import PartResult
from megatron_offgrpo.data_config import FilterConfig, PrepareConfig
from megatron_offgrpo.errors import ConfigError
from tests.unit.data.test_store import make_row

PROBLEM = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi"


def decided(tmp_path, rows, parts=2, **options):
    """The rows, dealt in order to `parts` parts, after the decisions."""
    from dataclasses import replace

    folder = PartFolder(tmp_path / "parts")
    folder.path.mkdir()
    filled = [
        replace(make_row(name, [1], [[2]] * len(rewards), rewards), problem=problem, origin=f"in:{index + 1}")
        for index, (name, problem, rewards) in enumerate(rows)
    ]
    bounds = np.linspace(0, len(filled), parts + 1).astype(int)
    for part in range(parts):
        result = PartResult(rows=list(enumerate(filled[bounds[part] : bounds[part + 1]])))
        folder.write(part, result, with_signatures=True)
    found = read_rows(folder, parts)
    decide(found, folder, PrepareConfig(**options))
    return found


ROWS = [
    ("a", PROBLEM, [1.0]),
    ("b", "another problem altogether", [1.0, 0.0]),
    ("a", "the third problem", [0.0]),
    ("c", f"  {PROBLEM.upper()}.", [1.0]),
    ("d", f"{PROBLEM} omicron", [0.0]),
    ("c", PROBLEM, [1.0]),
]


def test_first_of_equal_ids_problems_and_clusters_is_kept(tmp_path):
    filters = FilterConfig(duplicate_problems=True, near_duplicates=0.8)
    rows = decided(tmp_path, ROWS, filters=filters)
    # 12 shingles of three among 14 words; with one more word 13: Jaccard 12/13.
    assert rows.fate.tolist() == [KEPT, KEPT, SAME_ID, SAME_PROBLEM, NEAR_PROBLEM, SAME_ID]
    assert rows.partner.tolist() == [-1, -1, 0, 0, 0, 3]
    assert not rows.validation.any()


def test_nothing_but_equal_ids_goes_unasked(tmp_path):
    rows = decided(tmp_path, ROWS, parts=3)
    assert rows.fate.tolist() == [KEPT, KEPT, SAME_ID, KEPT, KEPT, SAME_ID]


def test_no_rows_at_all(tmp_path):
    rows = decided(tmp_path, [], filters=FilterConfig(duplicate_problems=True, max_all_positive_share=0.5))
    assert len(rows.fate) == 0


def many(number, similar=1):
    """Problems in clusters of `similar` that differ in one of 40 words."""
    rows = []
    for index in range(number):
        cluster = index // similar
        text = " ".join(f"c{cluster}w{place}" for place in range(40)) + f" {index % similar}"
        rows.append((f"g{index}", text, [1.0, float(index % 3 == 0)]))
    return rows


def test_all_positive_share(tmp_path):
    # 100 groups, 34 all positive (index 0, 3, ..., 99): 66 others allow 66 * 0.25 / 0.75 = 22.
    rows = decided(tmp_path, many(100), filters=FilterConfig(max_all_positive_share=0.25))
    dropped = np.flatnonzero(rows.fate == TOO_MANY_POSITIVE)
    assert len(dropped) == 12
    assert (dropped % 3 == 0).all()
    assert (rows.fate == KEPT).sum() == 88


def test_the_seed_chooses_the_all_positive_groups(tmp_path):
    drops = []
    for seed in (0, 0, 1):
        (tmp_path / f"{len(drops)}").mkdir()
        rows = decided(
            tmp_path / f"{len(drops)}", many(60), seed=seed, filters=FilterConfig(max_all_positive_share=0.1)
        )
        drops.append(np.flatnonzero(rows.fate == TOO_MANY_POSITIVE).tolist())
    assert drops[0] == drops[1] != drops[2]
    assert len(drops[0]) == 20 - 4  # 40 others allow 40 * 0.1 / 0.9 = 4.4


def test_validation_split_keeps_clusters_together(tmp_path):
    rows = decided(tmp_path, many(90, similar=3), validation_share=0.2, parts=4)
    apart = rows.validation.reshape(30, 3)
    assert (apart.all(axis=1) == apart.any(axis=1)).all()
    assert apart.all(axis=1).sum() == 6
    assert (rows.fate == KEPT).all()


def test_validation_split_depends_on_seed_and_problems_alone(tmp_path):
    chosen = []
    for name, seed, order in (("a", 0, 1), ("b", 0, -1), ("c", 1, 1)):
        (tmp_path / name).mkdir()
        rows = decided(tmp_path / name, many(40)[::order], validation_share=0.25, seed=seed)
        chosen.append(set(np.flatnonzero(rows.validation[::order]).tolist()))
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 10


def test_a_share_that_no_cluster_fits_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"12 groups in 1 clusters, the largest of 12"):
        decided(tmp_path, many(12, similar=12), validation_share=0.25)


def test_a_split_of_nothing_is_left_to_the_caller(tmp_path):
    """Every group was left out: `prepare` says why, whatever the share."""
    rows = decided(tmp_path, many(1), validation_share=0.25, filters=FilterConfig(max_all_positive_share=0.0))
    assert rows.fate.tolist() == [TOO_MANY_POSITIVE]
    assert not rows.validation.any()
