"""A judge is asked about what no rule reads, and about nothing else; its log is its memory."""

import json
import threading
from functools import partial

import pytest

from megatron_offgrpo import openai_server
from megatron_offgrpo.cli import main
from megatron_offgrpo.data import judge as judging
from megatron_offgrpo.data import part_runner
from megatron_offgrpo.data.grading import Grade, GradingPool
from megatron_offgrpo.data.judge import Judge, judge_line, log_beside, model_of, verdict_of
from megatron_offgrpo.data.prepare import PrepareConfig, prepare, summary_lines
from megatron_offgrpo.errors import ConfigError, DataError, GenerationError
from megatron_offgrpo.evaluation import grade_file as grading_of_files
from megatron_offgrpo.evaluation.grade_file import grade_file
from megatron_offgrpo.evaluation.grading import Solution, score
from tests.unit.data.tiny import group, write_lines
from tests.unit.evaluation.test_server_backend import ScriptedServer

UNREADABLE = Grade(0, "unreadable", None)
WORKER = partial(GradingPool, worker_module="tests.unit.data.unreadable_worker")
EQUAL, DIFFERENT = "They agree.\nVerdict: EQUAL", "<think>Verdict: EQUAL?</think>No.\n**Verdict: DIFFERENT**"


def reply(text):
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return 200, {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(openai_server, "RETRIES", 0)
    scripted = ScriptedServer()
    # Right answers are about seven, and nobody can tell whether "many" is.
    scripted.answer = lambda request, number: reply(verdict_on(request["messages"][0]["content"]))
    yield scripted
    scripted.server.shutdown()
    scripted.server.server_close()


def verdict_on(prompt):
    answer = prompt.split("<answer>")[1]
    return EQUAL if "seven" in answer else "Who knows?" if "many" in answer else DIFFERENT


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Verdict: EQUAL", "equal"),
        ("so ...\nverdict: **Equal**.", "equal"),
        ("**Verdict:** DIFFERENT", "different"),
        ("Verdict: EQUAL, then again Verdict: DIFFERENT", "unclear"),
        ("<think>Verdict: EQUAL</think>Verdict: DIFFERENT", "different"),
        ("<think>Verdict: EQUAL</think>I cannot say", "unclear"),
        ("They are equal.", "unclear"),
        ("Verdict: EQUALLY good", "unclear"),
        ("Verdict: not equal", "unclear"),
        ("", "unclear"),
    ],
)
def test_the_verdict_of_a_reply(text, verdict):
    assert verdict_of(text) == verdict


def test_only_the_unreadable_is_asked_about_and_a_clear_rule_stands(server, tmp_path):
    judge = Judge(server.url, "m", tmp_path / "log")
    clear = [Grade(1, "ok", "7"), Grade(0, "ok", "8"), Grade(0, "no_answer", None), Grade(0, "timeout", None)]
    asked = [("p", "7", "about seven")] * 4
    assert judge.settle(asked, clear) == clear
    assert server.requests == []
    grades = [*clear[:2], UNREADABLE, Grade(0, "unreadable", "about eight"), Grade(0, "unreadable", "many")]
    asked = [("3+4?", "7", text) for text in ("x", "x", "It is about seven.", "so \\boxed{about eight}", "many")]
    assert judge.settle(asked, grades) == [
        *clear[:2],
        Grade(1, "judged", None),
        Grade(0, "judged", "about eight"),
        Grade(0, "unreadable", "many"),
    ]
    assert judge.counts == {"equal": 1, "different": 1, "unclear": 1, "asked": 3}
    prompts = [request["messages"][0]["content"] for request in server.requests]
    assert all("<problem>\n3+4?\n</problem>\n<reference>\n7\n</reference>" in prompt for prompt in prompts)
    # The extracted answer where there is one, else the solution.
    assert sorted(prompt.split("<answer>\n")[1].split("\n</answer>")[0] for prompt in prompts) == [
        "It is about seven.",
        "about eight",
        "many",
    ]
    assert {(request["model"], request["temperature"], request["seed"]) for request in server.requests} == {
        ("m", 0.0, 0)
    }
    found = {one["prompt"]: one for one in lines_of(tmp_path / "log")}
    assert found.keys() == set(prompts)
    assert all(one.keys() == {"prompt", "model", "reply", "verdict"} for one in found.values())
    for one in found.values():
        assert (one["model"], one["reply"]) == ("m", verdict_on(one["prompt"]))
        assert one["verdict"] == verdict_of(one["reply"])


def test_the_same_question_is_asked_once(server, tmp_path):
    asked, grades = [("p", "7", "about seven")] * 40 + [("p", "7", "many")], [UNREADABLE] * 41
    first = Judge(server.url, "m", tmp_path / "log")
    settled = first.settle(asked, grades)
    assert (len(server.requests), first.counts) == (2, {"equal": 40, "unclear": 1, "asked": 2})
    # From here on the server would say something else, and nobody asks it.
    server.answer = lambda request, number: reply(DIFFERENT)
    assert first.settle(asked, grades) == settled
    again = Judge(server.url, "m", tmp_path / "log")
    assert again.settle(asked, grades) == settled
    assert (len(server.requests), again.counts) == (2, {"equal": 40, "unclear": 1})
    # Another model, another problem or another reference is another question.
    assert Judge(server.url, "n", tmp_path / "log").settle(asked[:1], grades[:1]) == [Grade(0, "judged", None)]
    others = [("q", "7", "about seven"), ("p", "8", "about seven")]
    assert again.settle(others, grades[:2]) == [Grade(0, "judged", None)] * 2
    assert len(server.requests) == 5


def test_judges_that_share_a_log_agree(server, tmp_path):
    """The reply that is written first counts for all."""
    verdicts = iter([EQUAL, DIFFERENT] * 50)
    together = threading.Barrier(4, timeout=30)

    def answer(request, number):
        together.wait()
        return reply(next(verdicts))

    server.answer = answer
    judges = [Judge(server.url, "m", tmp_path / "log") for _ in range(4)]
    settled: list[list[Grade]] = [[] for _ in judges]

    def settle(place):
        for number in range(5):
            settled[place] += judges[place].settle([("p", "7", f"about {number}")], [UNREADABLE])

    threads = [threading.Thread(target=settle, args=(place,)) for place in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(server.requests) == 20
    assert len(lines_of(tmp_path / "log")) == 5
    assert all(one == settled[0] for one in settled)
    assert len(settled[0]) == 5


def test_a_failing_server_leaves_answers_unreadable_and_is_counted(server, tmp_path, capsys):
    bad = {"about a refusal": (400, {"error": {"message": "too long"}}), "about nothing": (200, {"choices": []})}
    server.answer = lambda request, number: next(
        (answer for text, answer in bad.items() if text in request["messages"][0]["content"]), reply(EQUAL)
    )
    judge = Judge(server.url, "m", tmp_path / "log")
    asked = [("p", "7", text) for text in (*bad, "about seven")]
    assert judge.settle(asked, [UNREADABLE] * 3) == [UNREADABLE, UNREADABLE, Grade(1, "judged", None)]
    assert judge.counts == {"equal": 1, "failed": 2, "asked": 1}
    assert "judge: " in capsys.readouterr().err
    assert judge_line(judge.counts) == (
        "3 answers that no rule reads, judged: equal 1, different 0, unclear 0, failed 2 (1 questions asked); "
        "2 stay unreadable"
    )
    assert len(lines_of(tmp_path / "log")) == 1
    # A failure is no verdict: the next run asks again.
    server.answer = lambda request, number: reply(DIFFERENT)
    again = Judge(server.url, "m", tmp_path / "log")
    assert [grade.status for grade in again.settle(asked, [UNREADABLE] * 3)] == ["judged"] * 3


def test_a_server_that_is_gone_is_not_asked_again_and_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "CONCURRENCY", 1)
    server.answer = lambda request, number: None
    judge = Judge(server.url, "m", tmp_path / "log")
    asked = [("p", "7", f"about {number}") for number in range(30)]
    assert judge.settle(asked, [UNREADABLE] * 30) == [UNREADABLE] * 30
    assert (judge.counts, len(server.requests)) == ({"failed": 30}, 1)


def test_the_model_is_the_only_one_or_named(server):
    assert model_of(None, None) is None
    assert model_of(server.url, None) == "m"
    assert model_of("http://127.0.0.1:1/v1", "named") == "named"
    with pytest.raises(ConfigError, match="--judge-model: a model without a server"):
        model_of(None, "m")
    with pytest.raises(GenerationError, match="does not answer"):
        model_of("http://127.0.0.1:1/v1", None)
    server.models = ["a", "b"]
    with pytest.raises(ConfigError, match=r"one model; got a, b; remedy: name it with --judge-model"):
        model_of(server.url, None)


def test_a_torn_last_line_is_asked_for_again_and_any_other_is_an_error(server, tmp_path):
    log = tmp_path / "log"
    asked = [("p", "7", "about seven"), ("p", "7", "about eight")]
    settled = Judge(server.url, "m", log).settle(asked, [UNREADABLE] * 2)
    whole = log.read_bytes()
    log.write_bytes(whole[:-20])
    assert Judge(server.url, "m", log).settle(asked, [UNREADABLE] * 2) == settled
    assert len(server.requests) == 3
    assert sorted(log.read_bytes().splitlines()) == sorted(whole.splitlines())
    for line in (b"{}\n", b"nonsense\n", b'{"prompt": "p", "model": "m", "reply": "r", "verdict": "maybe"}\n'):
        log.write_bytes(whole + line)
        with pytest.raises(DataError, match=r"log:3: not a line of a judge's log .*remedy: delete it"):
            Judge(server.url, "m", log)


def test_both_scores_after_a_verdict(server, tmp_path):
    judge = Judge(server.url, "m", tmp_path / "log")
    texts = [
        "\\boxed{\\text{about seven}}",
        "it is about seven",
        "\\boxed{\\text{about 8}}",
        "many, about",
        "\\boxed{7}",
    ]
    with WORKER(1) as pool:
        found = list(score([Solution("7", text, problem="3+4?") for text in texts], pool, judge))
    assert [(one.lenient, one.strict, one.reason, one.status) for one in found] == [
        (1, 1, "equal", "judged"),
        (1, 0, "no_box", "judged"),
        (0, 0, "different", "judged"),
        (0, 0, "unreadable", "unreadable"),
        (1, 1, "equal", "ok"),
    ]


RECORDS = [
    group("clear", texts=["\\boxed{2}", "\\boxed{3}"]),
    group("asked", problem="p", answer="2", texts=["about seven", "about eight", "about many", "\\boxed{2}"]),
]


@pytest.fixture
def config(server, tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(part_runner, "GradingPool", WORKER)
    inputs = (str(write_lines(tmp_path / "in.jsonl", RECORDS)),)
    return PrepareConfig(inputs, str(tokenizer_dir), str(tmp_path / "store"), select="random", workers=1)


def test_prepare_labels_by_the_verdicts(config, server, tmp_path):
    from dataclasses import replace

    plain = prepare(config)
    assert plain.rewards.tolist() == [1, 0, 0, 0, 0, 1]
    assert plain.manifest.counts["labels"] == {"ok": 3, "unreadable": 3}
    with pytest.raises(DataError, match="made from other inputs or settings"):
        prepare(replace(config, judge=server.url))
    judged = prepare(replace(config, judge=server.url, overwrite=True))
    assert judged.rewards.tolist() == [1, 0, 1, 0, 0, 1]
    assert judged.row(1).label_statuses == ["judged", "judged", "unreadable", "ok"]
    assert judged.manifest.counts["judge"] == {"equal": 1, "different": 1, "unclear": 1, "asked": 3}
    (line,) = [line for line in summary_lines(judged) if line.startswith("judge ")]
    assert "equal 1, different 1, unclear 1, failed 0 (3 questions asked); 1 stay unreadable (see " in line
    assert log_beside(config.output).exists()
    # Made again, and by a server at another address that knows nothing: the log has all that is needed.
    server.answer = lambda request, number: reply(EQUAL)
    again = prepare(replace(config, judge=server.url, force=True))
    assert again.manifest.fingerprint == judged.manifest.fingerprint
    assert len(server.requests) == 3
    moved = prepare(replace(config, judge="http://127.0.0.1:1/v1", judge_model="m"))
    assert moved.manifest.fingerprint == judged.manifest.fingerprint
    with pytest.raises(ConfigError, match="--judge: nothing to judge"):
        prepare(replace(config, judge=server.url, labels=("majority",)))


def test_grade_with_a_judge(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grading_of_files, "GradingPool", WORKER)
    lines = [
        {"group_id": "g", "sample_id": place, "problem": "3+4?", "answer": "7", "text": text}
        for place, text in enumerate(["\\boxed{7}", "about seven", "about eight", "about many"])
    ]
    source = write_lines(tmp_path / "in.jsonl", lines)
    counts = grade_file(source, tmp_path / "out.jsonl", processes=1, judge_url=server.url)
    assert (counts.graded, counts.lenient) == (4, 2)
    reasons = [one["reason"] for one in lines_of(tmp_path / "out.jsonl")]
    assert reasons == ["equal", "no_box", "different", "unreadable"]
    assert "3 answers that no rule reads, judged: equal 1, different 1, unclear 1" in capsys.readouterr().err
    server.answer = lambda request, number: reply(EQUAL)
    first = (tmp_path / "out.jsonl").read_bytes()
    arguments = [
        "offgrpo",
        "grade",
        "--input",
        str(source),
        "--output",
        str(tmp_path / "out.jsonl"),
        "--processes",
        "1",
    ]
    monkeypatch.setattr("sys.argv", [*arguments, "--judge", server.url, "--judge-model", "m"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert (tmp_path / "out.jsonl").read_bytes() == first
    assert len(server.requests) == 3
