"""The log-prob head against plain autograd, in chunks, over padded and split vocabularies."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_offgrpo.parallel.logprob import chunk_rows_for, vocab_parallel_logprob


def naive(hidden, weight, target, vocab_size):
    logp = (hidden @ weight[:vocab_size].t()).log_softmax(-1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def tensors(rows=7, hidden=5, columns=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(rows, hidden, generator=generator, dtype=dtype, requires_grad=True)
    w = torch.randn(columns, hidden, generator=generator, dtype=dtype, requires_grad=True)
    return h, w, torch.randint(0, columns - 2, (rows,), generator=generator)


def test_two_tokens_by_hand():
    # Logits log 3 and 0: p = 3/4 and 1/4; H = -(3/4) log(3/4) - (1/4) log(1/4) = 0.5623...
    hidden = torch.tensor([[3.0]]).log()
    weight = torch.tensor([[1.0], [0.0]])
    logp, entropy = vocab_parallel_logprob(hidden, weight, torch.tensor([1]), vocab_size=2, chunk_rows=1)
    assert logp.item() == pytest.approx(-1.3862944)
    assert entropy.item() == pytest.approx(0.5623351)


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100])
def test_values_and_gradients_equal_plain_autograd(chunk_rows):
    hidden, weight, target = tensors()
    got = vocab_parallel_logprob(hidden, weight, target, vocab_size=9, chunk_rows=chunk_rows)
    expected = naive(hidden, weight, target, 9)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    coefficients = torch.randn(2, 7, dtype=torch.float64)
    wanted = torch.autograd.grad((torch.stack(expected) * coefficients).sum(), (hidden, weight))
    # Logits that were kept are used up by the first backward pass.
    for again in (True, False):
        total = (torch.stack(got) * coefficients).sum()
        gradients = torch.autograd.grad(total, (hidden, weight), retain_graph=again)
        for a, b in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        # The two padded columns beyond the real vocabulary.
        assert (gradients[1][9:] == 0).all()


@pytest.mark.parametrize(("chunk_rows", "products"), [(7, 3), (6, 4)])
def test_logits_of_few_rows_are_computed_once(chunk_rows, products):
    # h W^T and two gradients; where the logits do not fit, h W^T again.
    hidden, weight, target = tensors()
    multiplications = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal multiplications
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
                left, right = args[-2:]
                multiplications += left.shape[0] * left.shape[1] * right.shape[1]
            return func(*args, **(kwargs or {}))

    with Watch():
        logp, entropy = vocab_parallel_logprob(hidden, weight, target, vocab_size=11, chunk_rows=chunk_rows)
        (logp.sum() + entropy.sum()).backward()
    assert multiplications == products * 7 * 5 * 11


@pytest.mark.parametrize("chunk_rows", [3, 4])
def test_gradcheck(chunk_rows):
    hidden, weight, target = tensors(4, 3, 6)

    def both(h, w):
        return torch.stack(vocab_parallel_logprob(h, w, target, vocab_size=5, chunk_rows=chunk_rows))

    assert torch.autograd.gradcheck(both, (hidden, weight))


def test_padded_columns_do_not_count_however_large():
    hidden, weight, target = tensors()
    with torch.no_grad():
        weight[9:] = 1e3
    got = vocab_parallel_logprob(hidden, weight, target, vocab_size=9, chunk_rows=2)
    torch.testing.assert_close(got[0], naive(hidden, weight, target, 9)[0])


def test_no_rows_still_carries_a_gradient_of_zero():
    hidden, weight, _ = tensors()
    rows = hidden[:0]
    logp, entropy = vocab_parallel_logprob(rows, weight, torch.zeros(0, dtype=torch.long), vocab_size=9, chunk_rows=4)
    (logp.sum() + entropy.sum()).backward()
    assert logp.shape == (0,)
    assert (weight.grad == 0).all()


def test_bf16_rows_give_fp32_results_near_the_exact_ones():
    hidden, weight, target = tensors(64, 32, 50, torch.bfloat16)
    logp, entropy = vocab_parallel_logprob(hidden, weight, target, vocab_size=50, chunk_rows=10)
    assert logp.dtype == entropy.dtype == torch.float32
    exact = naive(hidden.double(), weight.double(), target, 50)
    # One bf16 rounding of a logit of size ~16 is up to 2^-5.
    torch.testing.assert_close(logp.double(), exact[0], atol=0.08, rtol=0)
    (logp.sum()).backward()
    assert weight.grad.dtype == torch.bfloat16


def test_largest_temporary_is_a_chunk_not_the_whole_table():
    rows, columns, chunk = 512, 4096, 16
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight = torch.randn(columns, 8, requires_grad=True)
    target = torch.randint(0, columns, (rows,))
    largest = 0  # with fewer rows in a chunk than there are, so that nothing is kept

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        logp, entropy = vocab_parallel_logprob(hidden, weight, target, vocab_size=columns, chunk_rows=chunk)
        (logp.sum() + entropy.sum()).backward()
    assert largest == chunk * columns


def test_chunk_rows():
    # 64 MiB of fp32 at 32,000 columns: 2^26 / (4 * 32000) = 524 rows.
    assert chunk_rows_for(64, 32000) == 524
    assert chunk_rows_for(1, 10**9) == 1
