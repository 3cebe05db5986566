"""What a store says of the chat template and the tags it was made with."""

from dataclasses import replace

import pytest

from megatron_offgrpo.data.prepare import prepare, summary_lines
from megatron_offgrpo.data_config import FilterConfig, PrepareConfig
from megatron_offgrpo.errors import ConfigError
from tests.unit.data.tiny import EOS, TEMPLATE, group, save_tokenizer, write_lines

CLOCK = "{{ strftime_now('%Y') }}" + TEMPLATE.replace("{% endfor", "<|end|>{% endfor")
SWITCH = "{% if quick %}<|system|>quick{% endif %}" + TEMPLATE


def config(tmp_path, template, *groups, eos="<|pad|>", **values):
    tokenizer = save_tokenizer(tmp_path / "tokenizer", chat_template=template, eos=eos)
    source = write_lines(tmp_path / "in.jsonl", groups or [group()])
    return PrepareConfig((str(source),), str(tokenizer), str(tmp_path / "store"), workers=1, **values)


def test_the_end_of_turn_and_the_date_are_said_and_recorded(tmp_path, capsys):
    store = prepare(config(tmp_path, CLOCK))
    said = capsys.readouterr().err
    assert "responses end in <|end|>, the chat template's end of turn; the tokenizer's EOS is <|pad|>" in said
    assert "the chat template asks for the date: it is given 2024-07-26" in said
    assert store.manifest.counts["end_of_turn"] == EOS
    assert store.manifest.config["chat_template_kwargs"] == {"strftime_now": "2024-07-26"}
    row = store.row(0)
    assert [ids[-1] for ids in row.response_ids] == [1, 1]  # <|end|>; <|pad|> is 0
    other = prepare(config(tmp_path, CLOCK, chat_template_kwargs={"strftime_now": "1999-01-01"}, overwrite=True))
    assert other.row(0).prompt_ids != row.prompt_ids


def test_variables_of_the_template_make_another_store(tmp_path):
    plain = prepare(config(tmp_path, SWITCH))
    asked = config(tmp_path, SWITCH, chat_template_kwargs={"quick": True}, overwrite=True)
    assert prepare(asked).row(0).prompt_ids[: len("quick") + 1] != plain.row(0).prompt_ids[: len("quick") + 1]
    with pytest.raises(ConfigError, match=r"chat_template_kwargs\.slow: the chat template has no such variable"):
        prepare(config(tmp_path, SWITCH, chat_template_kwargs={"slow": True}, overwrite=True))


def test_tags_decide_on_labels(tmp_path):
    text = "<plan>\\boxed{2}</plan> it is \\boxed{3}, [THINK]\\boxed{3}[/THINK]\\boxed{2}"
    known = prepare(config(tmp_path, TEMPLATE, group(answer="2", texts=(text,))))
    assert known.row(0).rewards == [1.0]
    cut = text.partition("[THINK]")[0]
    asked = config(tmp_path, TEMPLATE, group(answer="3", texts=(cut,)), think_tags=("<plan>...</plan>",))
    assert prepare(replace(asked, overwrite=True)).row(0).rewards == [1.0]
    with pytest.raises(ConfigError, match="think tags: no pair of tags"):
        prepare(replace(asked, think_tags=("<plan>",)))


def test_turns_inside_a_response_are_counted(tmp_path):
    texts = ("\\boxed{2}<|end|><|user|>And?", "\\boxed{2}<|end|>", "\\boxed{3}")
    store = prepare(config(tmp_path, TEMPLATE, group(texts=texts), eos=EOS))
    assert store.manifest.counts["responses_with_turns_inside"] == 1
    assert "turns      1 responses go on after an end of turn" in summary_lines(store)


def test_lengths_that_filters_see_are_those_of_the_store(tmp_path):
    texts = ("1<|end|>\n", "1 2")
    filters = FilterConfig(min_response_tokens=3)
    store = prepare(config(tmp_path, TEMPLATE, group(texts=texts), eos=EOS, filters=filters))
    assert [len(ids) for ids in store.row(0).response_ids] == [4]  # 1, space, 2 and the end; "1" and the end are two
