"""The pool: right grades, and no expression that takes the run with it."""

import time

import pytest

from megatron_offgrpo.data.grading import Grade, GradingPool
from megatron_offgrpo.errors import OffgrpoError

BAD_WORKER = "tests.unit.data.bad_worker"


@pytest.mark.parametrize(
    ("gold", "text", "reward"),
    [
        ("18", r"It is \boxed{18}.", 1),
        ("18", r"It is \boxed{18.0}", 1),
        ("27.0", r"\boxed{27}", 1),
        ("025", r"\boxed{25}", 1),
        (r"\$18.90", r"\boxed{18.90}", 1),
        (r"\$18.90", r"\boxed{\$18.90}", 1),
        (r"\$18.90", r"\boxed{18}", 0),
        (r"(-\infty,0)\cup\{1\}.", r"\boxed{(-\infty,0)\cup\{1\}}", 1),
        (r"(-\infty,0)\cup\{1\}", r"\boxed{(-\infty,0)\cup\{1\}.}", 1),
        (r"$\frac{1}{2}$", r"\boxed{0.5}", 1),
        ("p - q", r"\boxed{p-q}", 1),
        ("3", r"first \boxed{3}, no: \boxed{4}", 0),
        ("4", r"first \boxed{3}, no: \boxed{4}", 1),
        ("4", r"\boxed{4} was cut \boxed{5", 1),
        ("4", r"<think> \boxed{3} </think> so \boxed{4}", 1),
        ("3", r"<think> \boxed{3} </think> so I give up", 0),
        ("26", "13 * 2 = $<<13*2=26>>26\nA: 26", 1),
        ("13", "13 * 2 = $<<13*2=26>>26\nA: 26", 0),
        (r"\text{(A)}", r"\boxed{A}", 1),
        ("1,2", r"\boxed{2, 1}", 1),
        ("10{,}000", r"\boxed{10000}", 1),
    ],
)
def test_grades(pool, gold, text, reward):
    (grade,) = pool.grade([(gold, text)])
    assert (grade.reward, grade.status) == (reward, "no_answer" if "give up" in text else "ok")


def test_answers_come_in_order(pool):
    items = [(str(index), rf"\boxed{{{index if index % 3 else -1}}}") for index in range(300)]
    grades = pool.grade(iter(items))
    assert [grade.reward for grade in grades] == [int(index % 3 != 0) for index in range(300)]
    assert grades[7] == Grade(1, "ok", "7")
    assert pool.grade([]) == []


def test_what_cannot_be_graded_has_its_status(pool):
    statuses = [
        grade.status for grade in pool.grade([("", r"\boxed{1}"), ("1", ""), ("1", "no number"), ("1", "\x00")])
    ]
    assert statuses == ["empty_gold", "no_answer", "no_answer", "no_answer"]


def test_hostile_text_is_just_text(pool):
    texts = [r"\boxed{1}" * 5000, "\ud800 \\boxed{1}", "\\boxed{" * 3000, '{"ready": true}\n\\boxed{1}', "(" * 3000]
    assert [grade.reward for grade in pool.grade([("1", text) for text in texts])] == [1, 1, 0, 1, 0]


def test_extract(pool):
    grades = pool.extract([r"\boxed{\frac{1}{2}}", "nothing"])
    assert [grade.extracted for grade in grades] == [r"\frac{1}{2}", None]


def test_a_huge_expression_costs_one_sample():
    with GradingPool(processes=1, timeout_seconds=1.0) as pool:
        tower = r"\boxed{9^{9^{9^{9^{9}}}}}"
        grades = pool.grade([("1", r"\boxed{1}"), ("1", tower), ("2", r"\boxed{2}")])
    assert [grade.reward for grade in grades] == [1, 0, 1]
    assert grades[1].status in ("timeout", "out_of_memory")


def test_every_way_to_die_costs_one_sample():
    good = r"\boxed{1}"
    texts = [
        good,
        "exit",
        good,
        "segfault",
        good,
        "loop",
        good,
        "sleep",
        good,
        "memory",
        good,
        "print",
        "base exception",
    ]
    start = time.monotonic()
    with GradingPool(processes=2, timeout_seconds=0.5, worker_module=BAD_WORKER) as pool:
        grades = pool.grade([("1", text) for text in texts])
        again = pool.grade([("1", good)])
    statuses = dict(zip(texts, [grade.status for grade in grades], strict=True))
    assert statuses == {
        good: "ok",
        "exit": "crash",
        "segfault": "crash",
        "loop": "timeout",
        "sleep": "timeout",
        "memory": "out_of_memory",
        "print": "no_answer",
        "base exception": "crash",
    }
    assert [grade.reward for grade in grades] == [int(text == good) for text in texts]
    assert again == [Grade(1, "ok", "1")]
    assert time.monotonic() - start < 60


def test_workers_are_gone_afterwards():
    with GradingPool(processes=2, timeout_seconds=0.5, worker_module=BAD_WORKER) as pool:
        pool.grade([("1", "1"), ("1", "exit")])
        processes = [worker.process for worker in pool._workers]
    assert len(processes) == 2
    assert all(process.poll() is not None for process in processes)


def test_an_error_in_the_items_leaves_the_pool_usable(pool):
    def items():
        yield "1", r"\boxed{1}"
        raise RuntimeError("broken input")

    with pytest.raises(RuntimeError, match="broken input"):
        pool.grade(items())
    assert pool.grade([("2", r"\boxed{2}")]) == [Grade(1, "ok", "2")]


def test_a_worker_that_does_not_start_is_one_clear_error(monkeypatch):
    monkeypatch.setenv("BROKEN_WORKER", "1")
    with (
        GradingPool(processes=1, worker_module=BAD_WORKER) as pool,
        pytest.raises(OffgrpoError, match=r"does not start.*no module named math_verify"),
    ):
        pool.grade([("1", "1")])
