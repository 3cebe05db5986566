"""Where the final answer stands, and how it is wrapped for math-verify."""

import time

import pytest

from megatron_offgrpo.data.answers import as_math, last_box


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x\right\}}", r"\left\{x\right\}"),
        (r"\fbox{7}", None),
        (r"\boxed {7}", "7"),
        (r"\boxed{3} and cut \boxed{\frac{1}{", "3"),
        (r"\boxed{3} and \boxed{ }", "3"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\\boxed{6}", "6"),
        (r"\boxed{a \\{b}}", r"a \\{b}"),
        (r"stray } and { before \boxed{8} after }", "8"),
        ("boxed{3}", None),
        ("no box", None),
        ("", None),
    ],
)
def test_last_box(text, box):
    assert last_box(text) == box


def test_hostile_text_takes_linear_time():
    start = time.monotonic()
    assert last_box("\\boxed{" * 200_000) is None
    assert last_box("{" * 500_000 + "}" * 500_000) is None
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("answer", "wrapped"),
    [
        ("18", r"\boxed{18}"),
        (" 27.0 ", r"\boxed{27.0}"),
        ("$2$", r"\boxed{2}"),
        ("$$2$$", r"\boxed{2}"),
        (r"\(x\)", r"\boxed{x}"),
        (r"\$18.90", r"\boxed{\$18.90}"),
        (r"$\$18.90$", r"\boxed{\$18.90}"),
        ("25.", r"\boxed{25}"),
        ("$25.$", r"\boxed{25}"),
        ("$25$.", r"\boxed{25}"),
        (r"(-\infty,0)\cup\{1\}.", r"\boxed{(-\infty,0)\cup\{1\}}"),
        ("$8$,$4$", r"\boxed{$8$,$4$}"),
        (r"\boxed{9}", r"\boxed{9}"),
        ("1, 2, ...", r"\boxed{1, 2, ...}"),
    ],
)
def test_as_math(answer, wrapped):
    assert as_math(answer) == wrapped
