"""Tags of thoughts: what is the final part, what is unclosed, what a prompt opens."""

import pytest

from megatron_offgrpo.data.grading import GradingPool
from megatron_offgrpo.data.thinking import ThinkTags
from megatron_offgrpo.data_config import THINK_TAGS
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.evaluation.grading import Solution, score

PAIRS = [tuple(tag.split("...")) for tag in THINK_TAGS]
TAGS = ThinkTags()


@pytest.mark.parametrize(("opening", "closing"), [*PAIRS, ("<THINK>", "</THINK>"), ("<Thought>", "</Thought>")])
def test_every_known_tag(opening, closing):
    text = f"{opening}maybe 9{closing} It is 7."
    assert TAGS.final_part(text) == " It is 7."
    assert not TAGS.is_unclosed(text)
    assert TAGS.is_unclosed(f"{opening}maybe 9")
    assert TAGS.is_unclosed(text + f"{opening} or 8?")
    assert TAGS.opens(f"Why?\n{opening}\n")
    assert not TAGS.opens(f"Why?\n{opening}\n\n{closing}\n\n")
    assert not TAGS.opens(f"{opening} is a tag. Why?")
    assert TAGS.continued(f"Why?{opening}\n", f"{opening}\nso 7") == "so 7"
    assert TAGS.continued("Why?", f"{opening}\nso 7") == f"{opening}\nso 7"


def test_the_tags_that_models_are_known_to_write():
    wanted = {"<think>", "<thinking>", "<thought>", "<reasoning>", "<|begin_of_thought|>", "<seed:think>", "[THINK]",
              "◁think▷", "<|channel|>analysis<|message|>"}  # fmt: skip
    assert wanted <= {opening for opening, _ in PAIRS}


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("a</think>b</think>c", "c"),
        ("<think>a[/THINK]b", "b"),  # whichever tag opened it
        ("no thought", "no thought"),
        ("<think> cut", "<think> cut"),
        (
            "<|channel|>analysis<|message|>9?<|end|><|start|>assistant<|channel|>final<|message|>7",
            "7",
        ),
        ("İ <THINK>9</THINK>İ7", "İ7"),  # a letter whose small form is longer
    ],
)
def test_final_part(text, final):
    assert TAGS.final_part(text) == final


@pytest.mark.parametrize(
    ("text", "opened", "unclosed"),
    [
        ("so 7", False, False),
        ("so 7", True, True),
        ("so</think> 7", True, False),
        ("so</think> 7", False, False),
        ("so</think> 7 <think> or", True, True),
    ],
)
def test_unclosed(text, opened, unclosed):
    assert TAGS.is_unclosed(text, opened) == unclosed


def test_another_tag_than_the_templates_stays():
    assert TAGS.continued("Why?<think>\n", "<reasoning>so</reasoning>7") == "<reasoning>so</reasoning>7"
    assert TAGS.continued("Why?<think>\n", "<THINK>\nso") == "so"


def test_tags_are_a_setting():
    own = ThinkTags(["<plan>...</plan>", "{{ ... }}"])
    assert own.final_part("<plan>9</plan> 7</think>8") == " 7</think>8"
    assert own.opens("Why? {{")
    for bad in ("<plan>", "...</plan>", "<plan>..."):
        with pytest.raises(ConfigError, match=r"think tags: no pair of tags; expected OPEN\.\.\.CLOSE.*got "):
            ThinkTags([bad])
    with pytest.raises(ConfigError, match="no tags"):
        ThinkTags([])


@pytest.fixture(scope="module")
def pool():
    with GradingPool(1) as pool:
        yield pool


@pytest.mark.parametrize(("opening", "closing"), PAIRS)
def test_a_box_in_the_thought_is_no_answer(pool, opening, closing):
    phrase = f"{opening}maybe \\boxed{{9}}?{closing}The answer is 7."
    boxed = f"{opening}maybe \\boxed{{9}}?{closing}So \\boxed{{7}}."
    unclosed = f"{opening}maybe \\boxed{{7}}? Wait"
    solutions = [Solution("9", phrase), Solution("7", phrase), Solution("7", boxed), Solution("7", unclosed)]
    found = [(one.lenient, one.strict, one.reason) for one in score(solutions, pool)]
    assert found == [(0, 0, "different"), (1, 0, "no_box"), (1, 1, "equal"), (1, 0, "unclosed_think")]
    letters = Solution("B", f"{opening}\\boxed{{A}}?{closing}The answer is (B).", choices=4)
    assert next(score([letters], pool)).lenient == 1


def test_workers_take_the_tags_that_are_asked_for():
    text = "<think>\\boxed{9}</think> <plan>\\boxed{8}</plan> it is 7"
    with GradingPool(1, think_tags=["<plan>...</plan>"]) as own:
        assert [one.reward for one in own.grade([("7", text), ("8", text)])] == [1, 0]
        assert next(score([Solution("8", "<think> \\boxed{8}")], own)).strict == 1
    with GradingPool(1, think_tags=["<thought>...</thought>"]) as other:
        assert other.extract([text])[0].extracted == "8"
