"""The evaluation from sampling to metrics, with a back end that answers by rule."""

import importlib
import json
import shutil

import pytest
from transformers.utils import chat_template_utils as chat_utils

from megatron_offgrpo.cli.evaluation import evaluate_command, summary_lines
from megatron_offgrpo.data.grading import Grade, GradingPool
from megatron_offgrpo.data.judge import Judge
from megatron_offgrpo.errors import ConfigError, DataError, GenerationError
from megatron_offgrpo.evaluation import sampling
from megatron_offgrpo.evaluation.evaluate import EvaluationConfig, correctness, evaluate, read_graded, summarise
from megatron_offgrpo.evaluation.generate import GenerateConfig, generate
from megatron_offgrpo.evaluation.generation import BackendConfig, Completion, seed_of
from megatron_offgrpo.evaluation.task import make_task
from tests.unit.reporting.run_folder import write_small_store
from tools.base_student import CHAT_TEMPLATE, make_model, make_tokenizer

evaluating = importlib.import_module("megatron_offgrpo.evaluation.evaluate")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer(0).save_pretrained(folder)
    make_model(0).save_pretrained(folder)
    return folder


@pytest.fixture
def benchmark_file(tmp_path):
    path = tmp_path / "b.jsonl"
    records = [{"id": "x", "problem": "1+1?", "answer": "2"}, {"id": "y", "problem": "2+2?", "answer": "4"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


class RuleBackend:
    """Writes 2 in a box for even samples, nothing boxed for odd ones, in reverse order of the requests."""

    batch_size = 64

    def __init__(self, tokenizer):
        self.tokenizer, self.seen = tokenizer, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def generate(self, requests, settings):
        self.seen += list(requests)
        for index in reversed(range(len(requests))):
            text = "so \\boxed{2}" if index % 2 == 0 else "no idea"
            ids = tuple(self.tokenizer.encode(text))
            if index % 2 == 0:
                yield index, Completion((*ids, settings.stop_token_ids[-1]), "stop")
            else:
                yield index, Completion(ids, "length")


@pytest.fixture
def backend(monkeypatch):
    rule = RuleBackend(make_tokenizer(0))
    monkeypatch.setattr(sampling, "open_backend", lambda _: rule)
    return rule


def config(model, benchmark_file, output, **values):
    engine = BackendConfig(model, "hf", tensor_parallel=values.pop("tensor_parallel", 1))
    return EvaluationConfig(
        model, benchmark_file, output, **{"samples": 2, "backend": engine, "grading_processes": 1, **values}
    )


def test_writes_samples_grades_and_metrics(model, benchmark_file, tmp_path, backend):
    output = tmp_path / "out"
    metrics = evaluate(config(model, benchmark_file, output))
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [(s["problem_id"], s["sample_id"], s["text"]) for s in samples] == [
        ("x", 0, "so \\boxed{2}"),
        ("x", 1, "no idea"),
        ("y", 0, "so \\boxed{2}"),
        ("y", 1, "no idea"),
    ]
    assert [s["finish_reason"] for s in samples] == ["stop", "length"] * 2
    assert [s["seed"] for s in samples] == [seed_of(0, p, k) for p in "xy" for k in (0, 1)]
    assert [request.seed for request in backend.seen] == [s["seed"] for s in samples]
    graded = read_graded(output)
    assert [(g["reward"], g["status"], g["answer"]) for g in graded] == [
        (1, "ok", "2"),
        (0, "no_answer", "2"),
        (0, "ok", "4"),
        (0, "no_answer", "4"),
    ]
    assert metrics["accuracy"] == 0.25
    # One right answer of each pair of votes at x ("no idea" has none); at y the only vote is wrong.
    assert metrics["majority"] == metrics["strict"]["majority"] == 0.5
    assert (metrics["strict"]["accuracy"], metrics["no_box_share"], metrics["empty_share"]) == (0.25, 0.5, 0.0)
    assert [(g["strict"], g["reason"]) for g in graded] == [
        (1, "equal"),
        (0, "no_answer"),
        (0, "different"),
        (0, "no_answer"),
    ]
    assert metrics["pass_at"] == {"1": 0.25, "2": 0.5}
    assert metrics["truncated_share"] == 0.5
    assert metrics["statuses"] == {"no_answer": 2, "ok": 2}
    assert json.loads(json.dumps(metrics)) == json.loads((output / "metrics.json").read_text())


def test_equal_evaluation_is_reused_and_another_is_not(model, benchmark_file, tmp_path, backend):
    output = tmp_path / "out"
    first = evaluate(config(model, benchmark_file, output))
    assert evaluate(config(model, benchmark_file, output)) == json.loads(json.dumps(first))
    assert len(backend.seen) == 4
    evaluate(config(model, benchmark_file, output, seed=1))
    assert len(backend.seen) == 8
    evaluate(config(model, benchmark_file, output, seed=1, force=True))
    assert len(backend.seen) == 12
    benchmark_file.write_text(benchmark_file.read_text().replace("2+2?", "3+3?"))
    evaluate(config(model, benchmark_file, output, seed=1))
    assert len(backend.seen) == 16


def test_the_overlap_with_a_training_store_is_kept_also_when_the_rest_is_reused(
    model, benchmark_file, tmp_path, backend
):
    output, store = tmp_path / "out", tmp_path / "store"
    assert evaluate(config(model, benchmark_file, output))["contamination"] is None
    write_small_store(store)  # three groups whose problem is "p"
    found = evaluate(config(model, benchmark_file, output, store=store))["contamination"]
    assert (found["overlapping"], found["share"], len(backend.seen)) == (0, 0.0, 4)
    benchmark_file.write_text(benchmark_file.read_text().replace("1+1?", "P."))
    metrics = evaluate(config(model, benchmark_file, output, store=store))
    assert (metrics["contamination"]["overlapping"], metrics["contamination"]["problem_ids"]) == (1, ["x"])
    assert json.loads((output / "metrics.json").read_text())["contamination"]["overlapping"] == 1


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_something_else_is_left_alone(model, benchmark_file, tmp_path, backend, force):
    output = tmp_path / "mine"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="would overwrite something else"):
        evaluate(config(model, benchmark_file, output, force=force))
    assert (output / "thesis.tex").read_text() == "years of work"


class Broken(RuleBackend):
    """Finishes one sample, then runs out of memory."""

    def generate(self, requests, settings):
        yield 1, Completion(tuple(self.tokenizer.encode("no idea")), "length")
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more")


def test_a_failure_keeps_what_was_sampled_and_nothing_looks_finished(model, benchmark_file, tmp_path, monkeypatch):
    broken, output = Broken(make_tokenizer(0)), tmp_path / "out"
    monkeypatch.setattr(sampling, "open_backend", lambda _: broken)
    with pytest.raises(GenerationError, match=r"after 1 of 4 samples: .*RuntimeError: CUDA out of memory\. .*goes on"):
        evaluate(config(model, benchmark_file, output))
    assert not output.exists()
    (log,) = (tmp_path / "out.parts").rglob("*.jsonl")
    assert [(r["problem_id"], r["sample_id"]) for r in map(json.loads, log.read_text().splitlines())] == [("x", 1)]
    rule = RuleBackend(make_tokenizer(0))
    monkeypatch.setattr(sampling, "open_backend", lambda _: rule)
    assert evaluate(config(model, benchmark_file, output))["accuracy"] == 0.25
    assert not (tmp_path / "out.parts").exists()


def test_mistakes_are_named(model, benchmark_file, tmp_path):
    with pytest.raises(ConfigError, match="samples"):
        evaluate(config(model, benchmark_file, tmp_path / "out", samples=0))
    with pytest.raises(DataError, match="no Hugging Face model here"):
        evaluate(config(tmp_path, benchmark_file, tmp_path / "out"))
    with pytest.raises(ConfigError, match="tensor_parallel"):
        evaluate(config(model, benchmark_file, tmp_path / "out", tensor_parallel=2))
    with pytest.raises(DataError, match="no finished evaluation"):
        read_graded(tmp_path)


def test_empty_and_endless_completions_are_counted_and_wrong(model, benchmark_file, tmp_path, monkeypatch):
    class Odd(RuleBackend):
        def generate(self, requests, settings):
            for index in range(len(requests)):
                looping = tuple(self.tokenizer.encode("so so so so so"))
                yield index, Completion((), "stop") if index < 2 else Completion(looping, "length")

    monkeypatch.setattr(sampling, "open_backend", lambda _: Odd(make_tokenizer(0)))
    metrics = evaluate(config(model, benchmark_file, tmp_path / "out"))
    shares = [metrics[name] for name in ("accuracy", "empty_share", "truncated_share", "no_box_share", "majority")]
    assert shares == [0, 0.5, 0.5, 1, 0]
    assert metrics["statuses"] == {"no_answer": 4}
    assert metrics["token_quantiles"]["0.1"] == 0
    lines = summary_lines(metrics)
    assert lines[0] == "2 problems x 2 samples, by hf"
    assert lines[1].startswith("accuracy    0.0 %, 95 % interval 0.0 to 0.0 over new problems, 0.0 to 0.0 over new")
    assert any("truncated 50.0 %, no box 100.0 %, empty 50.0 %" in line for line in lines)


def test_several_benchmarks_share_one_model_and_an_option_wins_over_its_preset(
    model, benchmark_file, tmp_path, monkeypatch, capsys
):
    second = tmp_path / "second.jsonl"
    second.write_text(json.dumps({"problem": "1+1?", "answer": "2"}) + "\n")
    rule, opened = RuleBackend(make_tokenizer(0)), []
    monkeypatch.setattr(sampling, "open_backend", lambda engine: opened.append(engine) or rule)
    benchmarks = [str(benchmark_file), str(second)]
    evaluate_command(model, benchmarks, tmp_path / "out", preset="krafton", samples=2, backend="hf", shard="1/2")
    assert list(tmp_path.rglob("metrics.json")) == []
    evaluate_command(model, benchmarks, tmp_path / "out", preset="krafton", samples=2, backend="hf")
    settings = json.loads((tmp_path / "out" / "second.jsonl" / "manifest.json").read_text())["config"]
    assert [settings[name] for name in ("samples", "temperature", "top_p", "max_tokens")] == [2, 0.6, 0.95, 32768]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.jsonl", "second.jsonl"]
    # Two problems x two samples are one batch of the hf back end, the share 0 of 2: the first command drew nothing.
    assert (len(opened), len(rule.seen)) == (1, 6)
    out = capsys.readouterr().out
    assert "2 problems x 2 samples, by hf" in out
    assert "second.jsonl:" in out
    with pytest.raises(ConfigError, match=r"one output folder for two benchmarks.*second\.jsonl"):
        evaluate_command(model, [str(second), "elsewhere/second.jsonl"], tmp_path / "out")


def test_uneven_samples_are_refused():
    records = [{"problem_id": "x", "reward": 1}, {"problem_id": "x", "reward": 0}, {"problem_id": "y", "reward": 1}]
    with pytest.raises(DataError, match="number of samples"):
        correctness(records)


def test_an_unreadable_reference_answer_is_said_before_anything_is_sampled(model, tmp_path, backend):
    path = tmp_path / "b.jsonl"
    records = [{"id": "x", "problem": "1+1?", "answer": "2"}, {"id": "y", "problem": "2+2?", "answer": "$"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(DataError, match=r"1 of 2 reference answers cannot be read.*got y: .*--leave-out-unreadable"):
        evaluate(config(model, path, tmp_path / "out"))
    assert backend.seen == []
    metrics = evaluate(config(model, path, tmp_path / "out", leave_out_unreadable=True))
    assert (metrics["problems"], metrics["problems_left_out"], metrics["accuracy"]) == (1, 1, 0.5)


def test_summary_by_hand():
    records = [
        {"problem_id": p, "reward": r, "tokens": t, "finish_reason": "stop", "status": "ok"}
        for p, r, t in (("x", 1, 10), ("x", 1, 20), ("x", 0, 30), ("y", 0, 40), ("y", 0, 50), ("y", 0, 60))
    ]
    summary = summarise(records, seed=0)
    assert summary["accuracy"] == pytest.approx(1 / 3)
    # x has 2 of 3 right: pass@2 = 1 - C(1,2)/C(3,2) = 1; y none: (1 + 0) / 2.
    assert summary["pass_at"] == pytest.approx({"1": 1 / 3, "2": 1 / 2, "3": 1 / 2})
    assert (summary["mean_tokens"], summary["problems"], summary["samples_per_problem"]) == (35.0, 2, 3)


class Writes(RuleBackend):
    """Writes one text, special tokens and all, and the end of turn."""

    def __init__(self, tokenizer, text):
        super().__init__(tokenizer)
        self.text = text

    def generate(self, requests, settings):
        self.seen += list(requests)
        for index in range(len(requests)):
            yield index, Completion((*self.tokenizer.encode(self.text), self.tokenizer.eos_token_id), "stop")


def special_model(folder, template=CHAT_TEMPLATE, tags=("<think>", "</think>")):
    """A model whose tags of the thought are special tokens."""
    tokenizer = make_tokenizer(0)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *tags]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 512}))
    return tokenizer


@pytest.mark.parametrize("tags", [("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>")])
@pytest.mark.parametrize(
    ("written", "lenient", "strict"),
    [
        ("OPENis it \\boxed{2}? I run out", 1, 0),
        ("OPENis it \\boxed{3}?CLOSEThe answer is 2.", 1, 0),
        ("OPENis it \\boxed{3}?CLOSE\\boxed{2}", 1, 1),
    ],
)
def test_tags_that_are_special_tokens_stay_in_the_graded_text(
    benchmark_file, tmp_path, monkeypatch, tags, written, lenient, strict
):
    tokenizer = special_model(tmp_path, tags=tags)
    text = written.replace("OPEN", tags[0]).replace("CLOSE", tags[1])
    monkeypatch.setattr(sampling, "open_backend", lambda _: Writes(tokenizer, text))
    evaluate(config(tmp_path, benchmark_file, tmp_path / "out", samples=1))
    first = read_graded(tmp_path / "out")[0]
    assert (first["text"], first["reward"], first["strict"]) == (text, lenient, strict)


OPENS = CHAT_TEMPLATE.replace("assistant\n{% endif", "assistant\n[THINK]\n{% endif")


def test_a_prompt_may_open_the_thought_with_any_tag(benchmark_file, tmp_path, monkeypatch):
    tokenizer = special_model(tmp_path, OPENS)
    monkeypatch.setattr(sampling, "open_backend", lambda _: Writes(tokenizer, "I think \\boxed{2}"))
    assert evaluate(config(tmp_path, benchmark_file, tmp_path / "out"))["strict"]["accuracy"] == 0
    other = config(tmp_path, benchmark_file, tmp_path / "out", think_tags=("<think>...</think>",))
    assert evaluate(other)["strict"]["accuracy"] == 0.5


SWITCH = "{% if quick %}quick {% endif %}" + CHAT_TEMPLATE
CLOCK = "{{ strftime_now('%d %b %Y') }} " + CHAT_TEMPLATE


def test_prompts_belong_to_an_evaluation(benchmark_file, tmp_path, monkeypatch, capsys):
    backends = []

    def evaluated(source, **values):
        tokenizer = special_model(tmp_path, source)
        backends.append(Writes(tokenizer, "2"))
        monkeypatch.setattr(sampling, "open_backend", lambda _: backends[-1])
        evaluate(config(tmp_path, benchmark_file, tmp_path / "out", **values))
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        seen = backends[-1].seen
        return manifest, tokenizer.decode(seen[0].prompt_ids) if seen else None

    plain, prompt = evaluated(SWITCH)
    assert prompt.startswith("<|im_start|>")
    quick, prompt = evaluated(SWITCH, chat_template_kwargs={"quick": True})
    assert prompt.startswith("quick <|im_start|>")
    assert plain["fingerprint"] != quick["fingerprint"]
    assert plain["inputs"]["prompts"] != quick["inputs"]["prompts"]
    assert quick["config"]["chat_template_kwargs"] == {"quick": True}
    assert evaluated(SWITCH, chat_template_kwargs={"quick": True})[1] is None  # reused

    monkeypatch.setattr(chat_utils, "datetime", None)  # nobody may look at the clock
    dated, prompt = evaluated(CLOCK)
    assert prompt.startswith("26 Jul 2024 <|im_start|>")
    assert dated["config"]["chat_template_kwargs"] == {"strftime_now": "2024-07-26"}
    assert "the chat template asks for the date: it is given 2024-07-26" in capsys.readouterr().err
    chosen, prompt = evaluated(CLOCK, chat_template_kwargs={"strftime_now": "2025-12-31"})
    assert prompt.startswith("31 Dec 2025 <|im_start|>")
    assert chosen["fingerprint"] != dated["fingerprint"]
    with pytest.raises(ConfigError, match=r"chat_template_kwargs\.quick: the chat template has no such variable"):
        evaluated(CLOCK, chat_template_kwargs={"quick": True})
    with pytest.raises(ConfigError, match=r"chat_template_kwargs: this template has no variables; got none"):
        evaluated(CLOCK, template="none", chat_template_kwargs={"quick": True})


def test_temperature_0_takes_one_sample(model, benchmark_file, tmp_path, backend, capsys):
    metrics = evaluate(config(model, benchmark_file, tmp_path / "out", temperature=0.0, samples=4))
    assert "temperature 0: one sample of each problem instead of 4" in capsys.readouterr().err
    assert (metrics["samples_per_problem"], len(backend.seen)) == (1, 2)
    assert metrics["minimum_detectable_difference"] is metrics["ci95_new_samples"] is None
    assert not any("are noise" in line for line in summary_lines(metrics))
    evaluate(config(model, benchmark_file, tmp_path / "out", temperature=0.0, samples=1))
    assert len(backend.seen) == 2  # the same evaluation
    assert capsys.readouterr().err.count("temperature 0") == 0


@pytest.mark.parametrize("backend_name", ["hf", "vllm", "server"])
def test_a_prompt_beyond_the_models_vocabulary_is_refused(backend_name, model, benchmark_file, tmp_path, monkeypatch):
    larger = shutil.copytree(model, tmp_path / "larger")
    tokenizer = make_tokenizer(0)
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<t{number}>" for number in range(size - len(tokenizer) + 2)])
    tokenizer.save_pretrained(larger)
    monkeypatch.setattr("megatron_offgrpo.evaluation.task.choose_backend", lambda name: name)
    engine = BackendConfig(larger, backend_name)
    settings = EvaluationConfig(larger, benchmark_file, tmp_path / "out", samples=1, backend=engine)
    # The surplus does not occur in these prompts.
    assert make_task(settings).questions
    last = tokenizer.convert_ids_to_tokens(size)
    benchmark_file.write_text(json.dumps({"id": "z", "problem": f"{last} 1+1?", "answer": "2"}) + "\n")
    message = rf"prompt of z: token ids beyond the model's vocabulary; expected ids below {size} .*; got {size}; "
    with pytest.raises(DataError, match=message):
        evaluate(settings)
    with pytest.raises(DataError, match=message):
        generate(GenerateConfig(larger, benchmark_file, tmp_path / "groups.jsonl", backend=BackendConfig(larger, "hf")))


def test_an_end_token_that_the_model_cannot_write_is_refused(model, benchmark_file, tmp_path):
    larger = shutil.copytree(model, tmp_path / "larger")
    tokenizer = make_tokenizer(0)
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<t{number}>" for number in range(size - len(tokenizer))])
    tokenizer.chat_template = None  # its end of turn would be one that the model can write
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(larger)
    (larger / "generation_config.json").unlink()
    (larger / "chat_template.jinja").unlink()
    values = json.loads((larger / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps({**values, "eos_token_id": None}))
    with pytest.raises(DataError, match=rf"end token of the tokenizer: token ids beyond .* got {size}; "):
        evaluate(config(larger, benchmark_file, tmp_path / "out", template="none"))


def test_a_judge_settles_what_no_rule_reads(model, benchmark_file, tmp_path, monkeypatch, backend):
    class Unsure(GradingPool):
        """Its rules read no answer to the second problem."""

        def grade(self, items):
            pairs = list(items)
            unsure = Grade(0, "unreadable", "two")
            return [
                unsure if gold == "4" else grade for (gold, _), grade in zip(pairs, super().grade(pairs), strict=True)
            ]

    class Yes(Judge):
        def _reply(self, prompt):
            assert "2+2?" in prompt
            return "Verdict: EQUAL"

    monkeypatch.setattr(evaluating, "GradingPool", Unsure)
    monkeypatch.setattr(evaluating, "Judge", Yes)
    plain = evaluate(config(model, benchmark_file, tmp_path / "out"))
    assert (plain["accuracy"], plain["judge"]) == (0.25, None)
    assert plain["statuses"]["unreadable"] == 2
    judge = {"judge": "http://127.0.0.1:1/v1", "judge_model": "m"}
    judged = evaluate(config(model, benchmark_file, tmp_path / "out", **judge))
    assert (judged["accuracy"], judged["judge"]) == (0.75, {"equal": 2, "asked": 1})
    assert any("2 answers that no rule reads, judged: equal 2" in line for line in summary_lines(judged))
    assert {one["status"] for one in read_graded(tmp_path / "out")} == {"ok", "no_answer", "judged"}
    assert (tmp_path / "out.judge.jsonl").read_text().count("\n") == 1
    # Another judge is another evaluation.
    other = evaluate(config(model, benchmark_file, tmp_path / "out", **{**judge, "judge_model": "n"}))
    assert other["judge"] == {"equal": 2, "asked": 1}
