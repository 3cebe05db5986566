"""Malformed input of a hundred kinds: a reject with its place and reason, or one clear error; no good record lost."""

import gzip
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_offgrpo.data.prepare import PrepareConfig, prepare
from megatron_offgrpo.errors import DataError
from tests.unit.data.test_forms import OPENR1, VERL
from tests.unit.data.test_importers import BAD_RECORDS
from tests.unit.data.tiny import group, save_tokenizer

GOOD = [json.dumps({**group(f"good{index}"), "trajectories": [{"text": "a", "reward": 1}]}) for index in range(3)]


def line(**changes):
    return json.dumps({**group("bad"), "trajectories": [{"text": "a", "reward": 1}], **changes})


def trajectory(**changes):
    return line(trajectories=[{"text": "a", "reward": 1, **changes}])


DEEP = '{"a":' * 2000 + "1" + "}" * 2000
HUGE = "9" * 5000
LINES = [
    "", "x", "{", "}", "[]", "{}", "null", "true", "1", '"text"', "NaN", "{]", "[{]}", "{'a': 1}", '{"a": 1,}',
    '{"a": 1} {"b": 2}', "\x00", "\x00" * 1000, '{"a"\x00: 1}', "\ufeff{}", "\x1b[31m", "\\", '"\\ud800"', "{" * 5000,
    "[" * 200_000, DEEP, f'{{"a": {HUGE}}}', '{"group_id": }', '{"group_id": "bad", "group_id": "again"}', "\u2028",
    "1e999",
    "-", "{\"a\": 01}", "{\"a\": +1}", "\t", "//comment", "<xml/>", "group_id,problem", "---\na: 1".replace("\n",
    " "),
    line()[:-1], line()[1:], line()[: len(line()) // 2], line() + "}", line().replace('"', "'"),
    line().replace(":", "="),
    line(group_id=float("nan")), line(group_id=1.5), line(group_id={}), line(group_id=[]), line(group_id=""),
    line(group_id="\ud800"), line(group_id=False), line(problem=float("inf")), line(problem={"a": 1}),
    line(problem=7),
    line(problem="\udfff"), line(problem="\n\t "), line(problem=True), line(answer="\ud800"), line(answer={"a": 1}),
    line(answer=float("-inf")), line(answer=[]), line(answer=["1", "2"]), line(answer=True),
    line(system=1), line(system=[]), line(system="\ud800"), line(trajectories=None), line(trajectories={}),
    line(trajectories=0), line(trajectories=[None]), line(trajectories=[1]), line(trajectories=[[]]),
    line(trajectories=[{}]), line(trajectories=["a"]), trajectory(text=None), trajectory(text=1),
    trajectory(text=["a"]),
    trajectory(text="\ud83d"), trajectory(text={}), trajectory(reward=None), trajectory(reward=2),
    trajectory(reward=-1),
    trajectory(reward=0.5), trajectory(reward=float("nan")), trajectory(reward=float("inf")), trajectory(reward="1"),
    trajectory(reward=[]), trajectory(reward={}), trajectory(reward=10**400), trajectory(logprobs=1),
    trajectory(logprobs="a"),
    trajectory(logprobs=[1.0]), trajectory(logprobs=[None]), trajectory(logprobs=[float("nan")]),
    trajectory(logprobs=[[-1]]),
    trajectory(logprobs=[-(10**400)]), trajectory(logprobs=[True]), trajectory(logprobs=[-1.0] * 50),
    trajectory(source=1), trajectory(source="\ud800"), trajectory(on_policy="yes"), trajectory(on_policy=1),
    trajectory(sample_id=1), trajectory(sample_id="\ud800"),
    json.dumps({"group_id": "bad", "problem": "p", "gold": "1", "solutions": []}),
    json.dumps({"group_id": "bad", "problem": "p", "gold": "1", "solutions": [{"text": "a", "label": 3}]}),
    json.dumps(VERL | {"prompt": None}), json.dumps(VERL | {"target_lst": {}}),
    json.dumps(VERL | {"target_rewards": "1"}),
    json.dumps(VERL | {"target_rewards": [None, None]}),
    json.dumps(VERL | {"reward_model": {"ground_truth": "\ud800"}}),
    json.dumps(VERL | {"extra_info": {"group_id": []}}), json.dumps(VERL | {"data_source": 3}),
    json.dumps(VERL | {"prompt": [{"role": [], "content": "a"}]}), json.dumps(OPENR1 | {"generations": "a"}),
    json.dumps(OPENR1 | {"correctness_math_verify": 3}), json.dumps(OPENR1 | {"generations": [1, 2]}),
    json.dumps(OPENR1 | {"uuid": {}}), json.dumps({"conversations": 3}), json.dumps({"messages": []}),
]  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("malformed")
    tokenizer = save_tokenizer(folder / "tokenizer")
    return PrepareConfig(
        tokenizer=str(tokenizer), output=str(folder / "store"), labels=("given",), workers=1, force=True
    )


def prepared(config, path):
    """Ids of the stored groups and the rejects; every reject has its place and its reason."""
    store = prepare(replace(config, inputs=(str(path),)))
    rejected = [json.loads(one) for one in (store.path / "rejected.jsonl").read_text("ascii").splitlines()]
    for one in rejected:
        assert one["where"].startswith(f"{path}:")
        assert one["reason"]
        assert one["expected"]
        assert "\n" not in one["got"]
    return store.table["group_id"].to_pylist(), rejected


def test_a_hundred_kinds_of_lines_among_good_ones(config, tmp_path):
    assert len(LINES) >= 100
    records = [one for bad in LINES for one in (bad, None)]
    good = iter(range(10**6))
    lines = [GOOD[0].replace("good0", f"good{next(good)}") if one is None else one for one in records]
    path = tmp_path / "in.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") + b"\n")
    ids, rejected = prepared(config, path)
    assert ids == [f"good{index}" for index in range(len(LINES))]
    expected = [f"{path}:{2 * index + 1}" for index, bad in enumerate(LINES) if bad.strip(" \t\n")]
    assert [one["where"] for one in rejected] == expected


BYTES = {
    "mixed newlines": b"\r\n".join(one.encode() for one in GOOD) + b"\n\r\n\n",
    "no newline at the end": "\n".join(GOOD).encode(),
    "byte order mark": b"\xef\xbb\xbf" + "\n".join(GOOD).encode(),
    "invalid bytes": b"\xff\xfe\n" + "\n".join(GOOD).encode() + b"\n\xc3\x28\n",
    "utf-16 line": "x".encode("utf-16") + b"\n" + "\n".join(GOOD).encode(),
    "NUL bytes": b"\x00\n" + "\n".join(GOOD).encode() + b"\n\x00\x00",
    "vertical tabs and form feeds": b"\x0b\n\x0c\n" + "\n".join(GOOD).encode(),
    "other line separators in a string": "\n".join(one.replace("What", "What\u2028\x85") for one in GOOD).encode(),
    "escaped NUL in a string": "\n".join(one.replace("What", "What\\u0000") for one in GOOD).encode(),
}


@pytest.mark.parametrize("data", BYTES.values(), ids=BYTES)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_odd_bytes_lose_no_good_record(config, tmp_path, data, suffix):
    path = tmp_path / f"in.{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    ids, _ = prepared(config, path)
    assert ids == ["good0", "good1", "good2"]


def test_a_line_of_fifty_megabytes_is_a_record_like_any_other(config, tmp_path):
    path = tmp_path / "in.jsonl"
    unknown = GOOD[1][:-1] + ', "noise": "' + "x" * 50_000_000 + '"}'
    path.write_text("\n".join([GOOD[0], unknown, "{" + "x" * 1000, GOOD[2]]))
    ids, rejected = prepared(config, path)
    assert ids == ["good0", "good1", "good2"]
    assert [one["where"] for one in rejected] == [f"{path}:3"]


def damaged(name, data):
    return pytest.param(name, data, id=name)


WHOLE = gzip.compress("\n".join(GOOD * 200).encode())


@pytest.mark.parametrize(
    ("name", "data"),
    [
        damaged("empty.jsonl", b""),
        damaged("blank.jsonl", b"\n \n"),
        damaged("empty.jsonl.gz", b""),
        damaged("half.jsonl.gz", WHOLE[: len(WHOLE) // 2]),
        damaged("without_end.jsonl.gz", WHOLE[:-6]),
        damaged("flipped.jsonl.gz", WHOLE[:40] + bytes([WHOLE[40] ^ 255]) + WHOLE[41:]),
        damaged("trailing.jsonl.gz", WHOLE + b"trailing bytes"),
        damaged("plain.jsonl.gz", GOOD[0].encode()),
        damaged("zip.jsonl", b"PK\x03\x04" + bytes(range(256))),
        damaged("empty.parquet", b""),
        damaged("text.parquet", GOOD[0].encode()),
        damaged("magic.parquet", b"PAR1" + b"\x00" * 100 + b"PAR1"),
        damaged("huge_footer.parquet", b"PAR1" + b"\xff" * 4 + b"PAR1"),
        damaged("names_alone.csv", b"a,b\n"),
        damaged("open_quote.csv", b'problem,answer\np,"1\n'),
        damaged("two_of_a_name.csv", b"a,a\n1,2\n"),
        damaged("utf16.csv", "problem,answer\np,1\n".encode("utf-16")),
        damaged("half.json", ("[" + ",".join(GOOD))[:-9].encode()),
        damaged("half.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 9999)[:-9]),
        damaged("unknown.xlsx", b"PK"),
        damaged("noextension", b"{}"),
    ],
)
def test_a_damaged_file_is_one_clear_error(config, tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        prepare(replace(config, inputs=(str(tmp_path / name),), output=str(tmp_path / "store")))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


PARQUET = {
    "other columns": pa.table({"x": [1, 2]}),
    "no rows": pa.table({"group_id": pa.array([], pa.string())}),
    "numbers for texts": pa.table({"group_id": [1], "problem": [2], "answer": [3], "trajectories": [[4]]}),
    "binary": pa.table({"group_id": [b"\xff"], "problem": [b"a"], "trajectories": [[b"b"]]}),
    "nulls": pa.table({"group_id": [None], "problem": [None], "trajectories": pa.array([None], pa.list_(pa.int8()))}),
    "structs": pa.table({"trajectories": [{"text": "a"}]}),
    "timestamps": pa.table({"trajectories": pa.array([10**18], pa.timestamp("ns"))}),
}


@pytest.mark.parametrize("table", PARQUET.values(), ids=PARQUET)
def test_parquet_of_other_columns_is_one_clear_error(config, tmp_path, table):
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(DataError, match=r"in\.parquet") as caught:
        prepare(replace(config, inputs=(str(tmp_path / "in.parquet"),), output=str(tmp_path / "store")))
    assert "\n" not in str(caught.value)


def test_parquet_rows_that_are_bad_do_not_take_good_ones_with_them(config, tmp_path):
    text = pa.array([b"a", b"\xff\xfe", b"b"], pa.binary()).view(pa.string())
    rewards = [[{"text": "t", "reward": 1.0}], [{"text": "t", "reward": 1.0}], [{"text": "t", "reward": float("nan")}]]
    table = pa.table({"group_id": text, "problem": ["p"] * 3, "answer": ["1"] * 3, "trajectories": rewards})
    pq.write_table(table, tmp_path / "in.parquet")
    ids, rejected = prepared(config, tmp_path / "in.parquet")
    assert ids == ["a"]
    assert [one["where"].rpartition(":")[2] for one in rejected] == ["2", "3"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["group_id", "problem", "answer", "system", "trajectories", "solutions", "gold", "target_lst", "prompt",
          "target_rewards", "reward_model", "extra_info", "generations", "correctness_math_verify", "uuid"]  # fmt: skip


RECORDS = st.builds(
    lambda base, changes: json.dumps({**base, **changes}).encode(),
    st.sampled_from([group("bad"), VERL, OPENR1, {}]),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
)
NOISE = st.binary(max_size=30).map(lambda data: data.replace(b"\n", b""))
FLIPPED = st.builds(
    lambda at, value: GOOD[0].encode()[:at] + bytes([value]) + GOOD[0].encode()[at + 1 :],
    st.integers(0, len(GOOD[0]) - 1),
    st.integers(11, 255),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(RECORDS | NOISE | FLIPPED, min_size=1, max_size=8))
@example([b"\xef\xbb\xbf"])
@example([b"\xef\xbb\xbf" * 2, b" "])
def test_whatever_stands_between_them_good_records_are_kept(config, tmp_path, lines):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join([GOOD[1].encode(), *lines, GOOD[2].encode()]))
    ids, rejected = prepared(config, path)
    assert ids[0] == "good1"
    assert ids[-1] == "good2"
    # A byte order mark alone is what files joined together leave.
    num_lines = sum(1 for one in lines if one.removeprefix(b"\xef\xbb\xbf").strip())
    assert len(ids) + len(rejected) == 2 + num_lines


def test_the_list_of_the_importers_is_among_them():
    assert len(BAD_RECORDS) > 35
