"""What a pack looks like to the model and to the loss."""

import numpy as np
import torch

from megatron_offgrpo.training.batch import Member, build_batch
from megatron_offgrpo.types import TokenizedTrajectory

CPU = torch.device("cpu")


class TwoTrajectories:
    """prompt 10 11 12, response 20 21; prompt 30, response 40 41 42 with known mu, the student's own."""

    on_policy = np.array([False, True])

    def trajectory(self, index):
        prompt, response, mu = [([10, 11, 12], [20, 21], None), ([30], [40, 41, 42], [-0.5, -0.25, -2.0])][index]
        known = None if mu is None else np.array(mu, np.float32)
        return TokenizedTrajectory(np.array(prompt, np.int32), np.array(response, np.int32), known)


def batch(members, multiple=4, reference=None):
    return build_batch(TwoTrajectories(), members, pack=3, pack_multiple=multiple, reference=reference, device=CPU)


def test_rows_are_the_places_before_response_tokens_and_nothing_else():
    got = batch([Member(0), Member(1)])
    # place       0  1  2  3  4 | 5  6  7  8 | 9 10 11
    # token      10 11 12 20 21 |30 40 41 42 | 0  0  0
    assert got.model_input.ids_1T.tolist() == [[10, 11, 12, 20, 21, 30, 40, 41, 42, 0, 0, 0]]
    assert got.model_input.positions_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]
    assert got.model_input.segments.cu_seqlens_q.tolist() == [0, 5, 9, 12]
    assert got.model_input.rows_R.tolist() == [2, 3, 5, 6, 7]
    assert got.model_input.targets_R.tolist() == [20, 21, 40, 41, 42]
    assert got.trajectory.tolist() == [0, 0, 1, 1, 1]


def test_loss_columns_follow_their_trajectory():
    members = [
        Member(0, group=7, advantage=0.5, reward=1.0, weight=0.125, kl_weight=0.0625),
        Member(1, group=8, advantage=-0.25, reward=0.0, weight=0.25, kl_weight=0.5),
    ]
    reference = {0: np.array([-1.0, -2.0], np.float32), 1: np.array([-3.0, -4.0, -5.0], np.float32)}
    got = batch(members, reference=reference.__getitem__)
    assert got.advantage.tolist() == [0.5, 0.5, -0.25, -0.25, -0.25]
    assert got.reward.tolist() == [1, 1, 0, 0, 0]
    assert got.on_policy.tolist() == [False, False, True, True, True]
    assert got.member_advantage.tolist() == [0.5, -0.25]
    terms = got.terms(torch.zeros(5), torch.zeros(5))
    assert terms.group_bounds == (0, 1, 2)
    assert batch([Member(0, group=7), Member(1, group=7)]).terms(torch.zeros(5), torch.zeros(5)).group_bounds == (0, 2)
    assert batch([]).terms(torch.zeros(0), torch.zeros(0)).group_bounds == (0,)
    assert got.weight.tolist() == [0.125, 0.125, 0.25, 0.25, 0.25]
    assert got.kl_weight.tolist() == [0.0625, 0.0625, 0.5, 0.5, 0.5]
    assert got.ref.tolist() == [-1, -2, -3, -4, -5]
    # mu is 0, the log of 1, where the trajectory carries none.
    assert got.mu.tolist() == [0, 0, -0.5, -0.25, -2.0]


def test_a_full_pack_gets_no_padding():
    assert batch([Member(0), Member(1)], multiple=3).model_input.ids_1T.shape == (1, 9)
    assert batch([Member(0), Member(1)], multiple=3).model_input.segments.cu_seqlens_q.tolist() == [0, 5, 9]


def test_a_zero_weight_pack_has_tokens_but_no_rows():
    got = batch([], multiple=4)
    assert got.model_input.ids_1T.shape == (1, 4)
    assert got.model_input.segments.cu_seqlens_q.tolist() == [0, 4]
    assert got.model_input.rows_R.shape == got.weight.shape == (0,)
    assert got.members == ()


def test_two_context_parallel_ranks_share_the_pack_by_its_ends():
    members = [Member(0, weight=1.0), Member(1, weight=2.0)]
    ranks = [
        build_batch(TwoTrajectories(), members, pack=0, pack_multiple=4, reference=None, device=CPU, cp=2, cp_rank=rank)
        for rank in range(2)
    ]
    # Four pieces of three tokens; rank 0 holds places 0-2 and 9-11, rank 1 places 3-8.
    # place       0  1  2 | 3  4 30 | 6  7  8 | 9 10 11    (5 is the second prompt)
    assert ranks[0].model_input.ids_1T.tolist() == [[10, 11, 12, 0, 0, 0]]
    assert ranks[1].model_input.ids_1T.tolist() == [[20, 21, 30, 40, 41, 42]]
    assert ranks[0].model_input.positions_T.tolist() == [0, 1, 2, 0, 1, 2]
    assert ranks[1].model_input.positions_T.tolist() == [3, 4, 0, 1, 2, 3]
    # Rows 2 | 3 5 6 7 of the row, of which rank 0 has the first.
    assert ranks[0].model_input.rows_R.tolist() == [2]
    assert ranks[1].model_input.rows_R.tolist() == [0, 2, 3, 4]
    assert [rank.row_places.tolist() for rank in ranks] == [[0], [1, 2, 3, 4]]
    assert [rank.weight.tolist() for rank in ranks] == [[1.0], [1.0, 2.0, 2.0, 2.0]]
    # Rank 1's tokens 3 and 4 see keys 0-4; 30 begins a segment at 5, which goes on in its second piece.
    # Laid rank after rank, places 3-8 of the row stand at 6-11, and 9-11 at 3-5.
    assert keys_of_parts(ranks[1]) == [(2, [0, 1, 2, 6, 7]), (1, [8]), (3, [8, 9, 10, 11])]
    assert keys_of_parts(ranks[0]) == [(3, [0, 1, 2]), (3, [3, 4, 5])]


def keys_of_parts(got):
    """Of each part its number of tokens, and where the keys that they see stand."""
    segments = got.model_input.segments
    keys = segments.key_places_K.split(list(segments.key_lengths))
    return [(count, places.tolist()) for count, places in zip(segments.query_lengths, keys, strict=True)]


class OneGroup:
    """prompt 10 11 12, responses 20 21, none at all, and 40 41 42; then prompt 50, response 60."""

    on_policy = np.array([False] * 4)

    def trajectory(self, index):
        response = [[20, 21], [], [40, 41, 42], [60]][index]
        prompt = [10, 11, 12] if index < 3 else [50]
        return TokenizedTrajectory(np.array(prompt, np.int32), np.array(response, np.int32), None)


def group_batch(**layout):
    members = [Member(0), *(Member(i, continues=True) for i in (1, 2)), Member(3)]
    return build_batch(OneGroup(), members, pack=0, pack_multiple=4, reference=None, device=CPU, **layout)


def test_responses_that_share_a_prompt_continue_it():
    got = group_batch()
    # place       0  1  2  3  4 | 5  6  7 | 8  9 |10 11
    # token      10 11 12 20 21 |40 41 42 |50 60 | 0  0
    assert got.model_input.ids_1T.tolist() == [[10, 11, 12, 20, 21, 40, 41, 42, 50, 60, 0, 0]]
    assert got.model_input.positions_T.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 0, 1]
    # 20 and 40 are both predicted at 12, the prompt's last place.
    assert got.model_input.rows_R.tolist() == [2, 3, 2, 5, 6, 8]
    assert got.model_input.targets_R.tolist() == [20, 21, 40, 41, 42, 60]
    assert got.trajectory.tolist() == [0, 0, 2, 2, 2, 3]
    assert keys_of_parts(got) == [(5, [0, 1, 2, 3, 4]), (3, [0, 1, 2, 5, 6, 7]), (2, [8, 9]), (2, [10, 11])]
    assert got.model_input.segments.cu_seqlens_q.tolist() == [0, 5, 8, 10, 12]
    assert got.model_input.segments.cu_seqlens_kv.tolist() == [0, 5, 11, 13, 15]


def test_a_shared_prompt_cut_by_context_parallelism():
    ranks = [group_batch(cp=2, cp_rank=rank) for rank in range(2)]
    # Pieces of three: 10 11 12 | 20 21 40 | 41 42 50 | 60 0 0; rank 0 has the first and the last.
    assert [rank.model_input.ids_1T.tolist() for rank in ranks] == [
        [[10, 11, 12, 60, 0, 0]],
        [[20, 21, 40, 41, 42, 50]],
    ]
    assert [rank.model_input.positions_T.tolist() for rank in ranks] == [[0, 1, 2, 1, 0, 1], [3, 4, 3, 4, 5, 0]]
    # Rows 2 3 2 5 6 8 of the row: whoever holds 12 has the first rows of both responses.
    assert [rank.row_places.tolist() for rank in ranks] == [[0, 2], [1, 3, 4, 5]]
    assert [rank.model_input.rows_R.tolist() for rank in ranks] == [[2, 2], [0, 2, 3, 5]]
    assert [rank.model_input.targets_R.tolist() for rank in ranks] == [[20, 40], [21, 41, 42, 60]]
    # Laid rank after rank, places 3-8 stand at 6-11, and 9-11 at 3-5. 60 sees 50 and itself.
    assert keys_of_parts(ranks[0]) == [(3, [0, 1, 2]), (1, [11, 3]), (2, [4, 5])]
    assert keys_of_parts(ranks[1]) == [(2, [0, 1, 2, 6, 7]), (1, [0, 1, 2, 8]), (2, [0, 1, 2, 8, 9, 10]), (1, [11])]
