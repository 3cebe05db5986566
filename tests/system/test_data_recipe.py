"""KRAFTON's data step on a local folder in OpenThoughts3's schema, the audit, and the way to verl and back."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_offgrpo.data.export import export_verl
from megatron_offgrpo.data.prepare import PrepareConfig, prepare
from megatron_offgrpo.data_config import FilterConfig
from megatron_offgrpo.errors import DataError
from megatron_offgrpo.recipe import load_data_recipe
from tests.unit.data.tiny import group, save_tokenizer, write_lines

PROBLEM = "How many marbles does the boy with number {} hold after he gives two of them to his friend at school today?"


def row(problem, text, domain="math"):
    turns = [{"from": "human", "value": problem}, {"from": "gpt", "value": text}]
    return {"difficulty": 7, "source": "aops", "domain": domain, "conversations": turns}


def openthoughts3(folder):
    """Seven math problems with 16 answers each, rows of a problem side by side, and two rows of code."""

    def answers(right, wrong=0, silent=0):
        texts = [rf"<think>way {index}</think> \boxed{{4}}" for index in range(right)]
        texts += [rf"<think>way {right + index}</think> \boxed{{{50 + index}}}" for index in range(wrong)]
        return texts + ["<think>I give up"] * silent

    names = ["red", "green", "blue", "black", "white", "brown", "grey", "pink", "gold", "lime"]
    problems = [f"{name} {name}er: what is the {name}est sum of {name} and four {name}s?" for name in names]
    rows = [row("Sort a list.", "def f", "code"), row("Reverse it.", "def g", "code")]
    groups = {
        problems[0]: answers(16),
        problems[1]: answers(10, wrong=6),
        problems[2]: [*answers(4), *answers(0, wrong=12)],  # 4 votes for 4, one for each of the others
        problems[3]: answers(0, silent=16),
        problems[4]: [*answers(3), *[r"\boxed{5}"] * 13],  # 13 equal texts: one is kept, and 3 wrong ones
        f"{problems[1].upper()}": answers(16),
        problems[5]: [*answers(2), *["Wait, again. " * 400 + r"\boxed{4}"] * 14],
    }
    rows += [row(problem, text) for problem, texts in groups.items() for text in texts]
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "train-00000-of-00001.parquet")
    return problems


def test_openthoughts3_math_with_the_counts_of_every_stage(tmp_path):
    problems = openthoughts3(tmp_path / "OpenThoughts3")
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    recipe = load_data_recipe("openthoughts3_math")
    assert (recipe.inputs, recipe.labels, recipe.trajectories_per_group) == (
        ("hf:open-thoughts/OpenThoughts3-1.2M",), ("majority",), 8,
    )  # fmt: skip
    config = replace(recipe, inputs=(str(tmp_path / "OpenThoughts3"),), tokenizer=str(tokenizer), workers=1,
                     output=str(tmp_path / "store"))  # fmt: skip
    store = prepare(config)
    rows = [store.row(index) for index in range(store.num_groups)]
    assert [one.problem for one in rows] == [problems[0], problems[1], problems[2], problems[4]]
    assert [one.rewards for one in rows] == [
        [1] * 8,
        [1, 0, 1, 0, 1, 0, 1, 0],
        [1, 0, 1, 0, 1, 0, 1, 0],
        [1, 0, 0, 0],  # the majority says 5: its one distinct text, and the three of 4
    ]
    assert rows[0].label_sources == ["majority"] * 8
    assert rows[0].sample_ids[0] == f"{tmp_path / 'OpenThoughts3'}:3"
    counts = store.manifest.counts
    assert counts["records_not_asked_for"] == 2
    assert {one["stage"]: (one["groups"], one["trajectories"]) for one in counts["stages"]} == {
        "read": (7, 112),
        "decontaminated": (7, 112),
        "labelled": (7, 112),
        # 15 copies of giving up, 12 of 5, and 14 loops are left out.
        "trajectories_filtered": (7, 112 - 15 - 12 - 14),
        # One giving up and two beside the loops are fewer than 4.
        "groups_filtered": (5, 68),
        "selected": (5, 36),
        "tokenised": (5, 36),
        "unique_ids": (5, 36),
        "unique_problems": (4, 28),
        "no_near_duplicates": (4, 28),
        "all_positive_limited": (4, 28),
    }
    assert counts["removed"] == {
        "duplicate problem": 1, "duplicate trajectory": 27, "repetition loop": 14, "too few trajectories": 2,
    }  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    long = {"text": "one two three " * 30 + "\\boxed{2}", "reward": 0}
    records = [
        group("mixed", PROBLEM.format(1), texts=["a \\boxed{2}", "\\boxed{3}"], system="Think."),
        group("right", PROBLEM.format(2), texts=["<script>alert(1)</script> \\boxed{2}"]),
        group("wrong", "Something else entirely, is it not?", texts=["\\boxed{7}", "\\boxed{7} "]),
        group("cut", "x" * 30) | {"trajectories": [long]},
        "{",
    ]
    return prepare(
        PrepareConfig(
            inputs=(str(write_lines(folder / "in.jsonl", records)),),
            tokenizer=str(save_tokenizer(folder / "tokenizer")),
            output=str(folder / "store"),
            labels=("math-verify", "majority"),
            max_response_tokens=60,
            workers=1,
            filters=FilterConfig(max_pass_rate=1.0),
        )
    )


def test_verl_and_back(store, tmp_path):
    line = export_verl(store, tmp_path / "out.parquet")
    assert line == f"{tmp_path / 'out.parquet'}: 4 groups, 6 solutions"
    first = pq.read_table(tmp_path / "out.parquet").to_pylist()[0]
    assert first["prompt"] == [{"role": "system", "content": "Think."}, {"role": "user", "content": PROBLEM.format(1)}]
    assert first["target"] == [{"role": "assistant", "content": "a \\boxed{2}"}]
    assert first["target_rewards"] == [1.0, 0.0]
    assert first["reward_model"]["ground_truth"] == "2"
    config = PrepareConfig(**{**store.manifest.config, "inputs": (str(tmp_path / "out.parquet"),), "labels": ("given",),
                              "filters": FilterConfig(), "output": str(tmp_path / "again"), "where": ()})  # fmt: skip
    again = prepare(config)
    assert again.manifest.fingerprint == store.manifest.fingerprint
    assert [again.row(index).texts for index in range(4)] == [store.row(index).texts for index in range(4)]
    assert again.row(0).system == "Think."
    with pytest.raises(DataError, match="already exists"):
        export_verl(store, tmp_path / "out.parquet")
    with pytest.raises(DataError, match=r"ends in \.parquet"):
        export_verl(store, tmp_path / "out.json")


def test_inspect(store, tmp_path, monkeypatch, capsys):
    import sys

    from megatron_offgrpo import cli

    bench = write_lines(tmp_path / "bench.jsonl", [{"problem": PROBLEM.format(5)}])
    page = tmp_path / "data.html"
    arguments = ["inspect", str(store.path), "--benchmark", str(bench), "--html", str(page)]
    monkeypatch.setattr(sys, "argv", ["offgrpo", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    out = capsys.readouterr().out
    # `cut` lost its answer to the limit, not its reward; the given label of its one solution was 0.
    assert "disagreement" in out
    assert "given 0, math-verify 1, majority 1; reference '2', found '2'" in out
    assert "right of K              1/1: 2, 0/2: 1, 1/2: 1" in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("solutions equal")] == ["1"]
    html = page.read_text()
    # 18 of 22 words stand before the number and 13 after it: both problems share an n-gram with the benchmark's.
    assert html.count("bench.jsonl:1") == 2
    assert "malformed JSON" in html
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "http" not in html.replace("http://www.w3.org", "")
    # The released objective: of 4 groups the all-negative one is dead; single right answers have A = b = 0.1.
    line = next(line for line in out.splitlines() if "openthinker3_7b," in line)
    # Cycled to 8: two single right answers with A = 0.1 each, and a right and a wrong one with A = +-0.5. Recipes that
    # make the same of the store share a line.
    sums = "sum of |A|: all positive 1.6, mixed 4.0, all negative 0.0; "
    assert line.startswith(f"1 of 4 groups without a signal; {sums}")
    assert "qwen3_8b" in line
    assert "openthinker3_7b_blog" not in line


def test_inspect_shows_every_token(store):
    from rich.console import Console

    from megatron_offgrpo.reporting.token_view import show_group

    console = Console(record=True, width=400, force_terminal=True, color_system="standard", highlight=False)
    show_group(store, "mixed", None, console)
    styled = console.export_text(styles=True)
    plain = Console(record=True, width=400, no_color=True)
    show_group(store, "3", None, plain)
    cut = plain.export_text()
    assert "cut at the maximum length, no EOS" in cut
    assert "60 tokens with weight" in cut
    assert "<|end|>" not in cut
    assert "\x1b[1;7;35m<|end|>" in styled
    assert "\x1b[34m<|user|>" in styled
    assert "\x1b[32m" in styled  # the right response
    assert "\x1b[31m" in styled  # the wrong one
    with pytest.raises(DataError, match=r"no such group.*'mixed', or a number below 4"):
        show_group(store, "absent", None)


def test_inspect_refuses_another_tokenizer(store, tmp_path):
    from megatron_offgrpo.reporting.token_view import show_group

    other = save_tokenizer(tmp_path / "other", corpus=["quite another corpus of words"])
    with pytest.raises(DataError, match="not the store's tokenizer"):
        show_group(store, "0", str(other))
    assert json.loads((store.path / "manifest.json").read_text())["inputs"]["tokenizer"]
