"""Each file format, read from small files written here; each error with its file, line and column."""

import json
import logging
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from synpo.pairs import FORMATS, PAIR_FEATURES, VIDEO_PROMPT, PairError, as_pairs, load_pairs

USER = {"role": "user", "content": "Who?"}
ANN = {"role": "assistant", "content": "Ann."}
BOB = {"role": "assistant", "content": "Bob."}
PLAIN = {"prompt": "Who?", "chosen": "Ann.", "rejected": "Bob."}
SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
        {"from": "human", "value": "Who?"},
    ],
    "chosen": {"from": "gpt", "value": "Ann."},
    "rejected": {"from": "gpt", "value": "Bob."},
}
RELEASE = {"video_name": "v1", "pos_pre": "A cat.", "neg_pre": "A dog.", "pos_score": 11.5, "neg_score": 3}


def write(path, *records):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(records)), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(records), indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "record", "prompt"),
    [
        ("columns", PLAIN, [USER]),
        ("columns", {"prompt": [USER], "chosen": [ANN], "rejected": [BOB]}, [USER]),
        ("implicit", {"chosen": [USER, ANN], "rejected": [USER, BOB]}, [USER]),
        ("implicit", {"chosen": [USER, ANN, USER, ANN], "rejected": [USER, ANN, USER, BOB]}, [USER, ANN, USER]),
        ("ms-swift", {"messages": [USER, ANN], "rejected_response": "Bob."}, [USER]),
        ("ms-swift", {"messages": [USER, ANN], "rejected_messages": [USER, BOB]}, [USER]),
        (
            "ms-swift",
            {"messages": [USER, ANN], "rejected_response": "Bob.", "system": "Be brief."},
            [{"role": "system", "content": "Be brief."}, USER],
        ),
        (
            "sharegpt",
            SHAREGPT,
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                USER,
            ],
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_formats_by_name_and_detected(tmp_path, name, record, prompt, suffix):
    file = write(tmp_path / f"pairs{suffix}", record, record)
    dataset = load_pairs(file)
    assert dataset.features == PAIR_FEATURES
    assert dataset[:] == load_pairs(file, name)[:]
    assert len(dataset) == 2
    assert (dataset[1]["prompt"], dataset[1]["chosen"], dataset[1]["rejected"]) == (prompt, [ANN], [BOB])
    place = {".jsonl": ":2", ".json": " record 2", ".parquet": " row 2"}[suffix]
    assert dataset[1]["source"] == f"{file}{place}"


def test_release_format(tmp_path):
    file = write(tmp_path / "out.jsonl", RELEASE, RELEASE | {"question": "What is it?", "pos_score": None})
    first, second = load_pairs(file)
    part = {"type": "video"}
    assert first["prompt"] == [{"role": "user", "content": [part, {"type": "text", "text": VIDEO_PROMPT}]}]
    assert second["prompt"][0]["content"][1]["text"] == "What is it?"
    assert first["videos"] == [{"path": "v1", "bytes": None, "frames": None}]
    assert (first["score_chosen"], first["score_rejected"], second["score_chosen"]) == (11.5, 3.0, None)
    assert {p["prompt"][0]["content"][1]["text"] for p in load_pairs(file, prompt="Tell.")} == {"Tell."}


def test_media_dir(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "v1.mp4").touch()
    release = write(tmp_path / "out.jsonl", RELEASE)
    assert load_pairs(release, media_dir=tmp_path)[0]["videos"][0]["path"] == str(tmp_path / "deep" / "v1.mp4")
    swift = write(
        tmp_path / "swift.jsonl",
        {"messages": [USER, ANN], "rejected_response": "Bob.", "images": ["a.png", "http://x/b.png", "/abs/c.png"]},
    )
    paths = [image["path"] for image in load_pairs(swift, media_dir=tmp_path)[0]["images"]]
    assert paths == [str(tmp_path / "a.png"), "http://x/b.png", "/abs/c.png"]

    (tmp_path / "v1.webm").touch()
    with pytest.raises(PairError, match=r"out\.jsonl:1: column 'video_name': 2 files named 'v1'"):
        load_pairs(release, media_dir=tmp_path)
    missing = write(tmp_path / "missing.jsonl", RELEASE | {"video_name": "v9"})
    with pytest.raises(PairError, match=r"missing\.jsonl:1: column 'video_name': no file named 'v9'"):
        load_pairs(missing, media_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="media_dir"):
        load_pairs(release, media_dir=tmp_path / "nowhere")


def test_folder_and_several_files(tmp_path):
    write(tmp_path / "b.jsonl", PLAIN)
    write(tmp_path / "a.json", SHAREGPT, SHAREGPT)
    (tmp_path / "README.md").write_text("no pairs")
    (tmp_path / ".hidden.jsonl").write_text("no pairs")
    sources = [f"{tmp_path / 'a.json'} record 1", f"{tmp_path / 'a.json'} record 2", f"{tmp_path / 'b.jsonl'}:1"]
    assert load_pairs(tmp_path)["source"][:] == sources
    assert load_pairs([tmp_path / "b.jsonl", str(tmp_path / "a.json")])["source"][:] == [sources[2], *sources[:2]]


def test_paths_that_are_no_pair_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        load_pairs(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match=r"holds no \.jsonl, \.json, \.parquet file"):
        load_pairs(tmp_path)
    (tmp_path / "pairs.csv").touch()
    with pytest.raises(ValueError, match=r"unknown suffix '\.csv'"):
        load_pairs(tmp_path / "pairs.csv")
    with pytest.raises(ValueError, match="no pair file given"):
        load_pairs([])
    with pytest.raises(ValueError, match=r"unknown pair format 'alpaca'; known: auto, sharegpt"):
        load_pairs(write(tmp_path / "p.jsonl", PLAIN), "alpaca")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: no pairs in it"):
        load_pairs(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("name", "text", "where", "words"),
    [
        ("p.jsonl", b'{"prompt": "a",\n', "p.jsonl:2", "malformed JSON at character"),
        ("p.jsonl", b"[1, 2]\n", "p.jsonl:2", "expected an object with named columns, got a list"),
        ("p.jsonl", b'{"prompt": "\xff"}\n', "p.jsonl:2", "not UTF-8 at byte 12"),
        ("p.jsonl", b'{"x": ' + b"9" * 5000 + b"}\n", "p.jsonl:2", "malformed JSON: "),
        ("p.jsonl", b"[" * 100_000 + b"\n", "p.jsonl:2", "malformed JSON: "),
        ("p.json", b'{"prompt": \n', "p.json:2", "a .json file holds one array [...] or one object per line"),
    ],
)
def test_a_line_that_is_no_record(tmp_path, name, text, where, words):
    (tmp_path / name).write_bytes(json.dumps(PLAIN).encode() + b"\n" + text)
    with pytest.raises(PairError) as caught:
        load_pairs(tmp_path / name)
    assert caught.value.where == str(tmp_path / where)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        (b'[{"a": 1},\n {"a" 1}]', "p.json:2", "malformed JSON at character 7"),
        (b'[{"a": 1}', "p.json:1", "malformed JSON"),
        (b'[{"a": "\xff"}]', "p.json", "not UTF-8"),
        (b"[" + b"9" * 5000 + b"]", "p.json", "malformed JSON: "),
        (b"[3]", "p.json record 1", "got a int"),
    ],
)
def test_a_json_array_that_cannot_be_read(tmp_path, text, where, words):
    (tmp_path / "p.json").write_bytes(text)
    with pytest.raises(PairError) as caught:
        load_pairs(tmp_path / "p.json")
    assert caught.value.where == str(tmp_path / where)
    assert words in str(caught.value)


def test_broken_parquet(tmp_path):
    (tmp_path / "p.parquet").write_bytes(b"PAR1 this is not parquet PAR1")
    with pytest.raises(PairError, match=r"p\.parquet: not readable as parquet"):
        load_pairs(tmp_path / "p.parquet")


def test_byte_order_mark_and_blank_lines(tmp_path):
    for name, text in (("a.jsonl", f"\n{json.dumps(PLAIN)}\n\n"), ("b.json", json.dumps([PLAIN]))):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert load_pairs(tmp_path)["source"][:] == [f"{tmp_path / 'a.jsonl'}:2", f"{tmp_path / 'b.json'} record 1"]


@pytest.mark.parametrize(
    ("second", "column", "words"),
    [
        ({"prompt": [USER], "chosen": [ANN], "rejected": [BOB]}, "prompt", "conversational here, plain at "),
        ({"prompt": "Who?", "chosen": "Ann."}, None, "for format 'columns': rejected; columns found: prompt, chosen"),
        (PLAIN | {"system": "Be brief."}, "system", "a plain prompt has no system message"),
    ],
)
def test_a_record_unlike_the_first(tmp_path, second, column, words):
    file = write(tmp_path / "p.jsonl", PLAIN, PLAIN, second)
    with pytest.raises(PairError) as caught:
        load_pairs(file)
    assert (caught.value.where, caught.value.column) == (f"{file}:3", column)
    assert words in str(caught.value)
    if column == "prompt":
        assert f"plain at {file}:1" in str(caught.value)


def test_no_known_format_lists_the_formats_and_the_nearest(tmp_path):
    with pytest.raises(PairError) as caught:
        load_pairs(write(tmp_path / "p.jsonl", {"question": "Who?", "answer": "Ann."}))
    assert "p.jsonl:1: no known pair format has these columns: question, answer" in str(caught.value)
    assert all(name in str(caught.value) for name in FORMATS)
    assert "Nearest" not in str(caught.value)
    with pytest.raises(PairError, match=r"Nearest is 'columns'; missing: rejected\."):
        load_pairs(write(tmp_path / "q.jsonl", {"prompt": "Who?", "chosen": "Ann."}))


@pytest.mark.parametrize(
    ("record", "column", "words"),
    [
        (SHAREGPT | {"conversations": "Hi"}, "conversations", "expected a list of turns, got a str"),
        (SHAREGPT | {"chosen": "Ann."}, "chosen", "turn 0: expected a dict with 'from' and 'value', got 'Ann.'"),
        (SHAREGPT | {"chosen": {"from": "bot", "value": "x"}}, "chosen", "'from' is 'bot', which is none of system"),
        (SHAREGPT | {"rejected": {"from": ["gpt"], "value": "x"}}, "rejected", "'from' is ['gpt']"),
        (SHAREGPT | {"conversations": SHAREGPT["conversations"][:3]}, "conversations", "the last message is the"),
        (SHAREGPT | {"system": "Too."}, "system", "has a system message already"),
        (SHAREGPT | {"system": 3}, "system", "expected text, got 3"),
        ({"messages": [ANN], "rejected_response": "x"}, "messages", "end with the chosen answer"),
        ({"messages": [USER, USER], "rejected_response": "x"}, "messages[-1]", "expected one assistant message"),
        ({"messages": [USER, ANN], "rejected_response": ["x"]}, "rejected_response", "expected one answer as text"),
        ({"messages": [USER, ANN], "rejected_messages": [BOB]}, "rejected_messages", "end with the rejected answer"),
        ({"messages": [USER, ANN], "rejected_messages": [ANN, BOB]}, "rejected_messages", "message 0 differs"),
        ({"messages": [USER, ANN], "rejected_messages": [USER, USER]}, "rejected_messages[-1]", "got: user"),
        (
            {"messages": [USER, ANN], "rejected_response": "x", "images": ["a"], "rejected_images": ["b"]},
            "rejected_images",
            "differs from 'images'",
        ),
        ({"chosen": "Ann.", "rejected": "Bob."}, "chosen", "without a column 'prompt'"),
        ({"chosen": [USER, ANN, ANN], "rejected": [USER, BOB]}, "rejected", "message 1 differs"),
        ({"chosen": [USER, USER], "rejected": [USER, BOB]}, "chosen[-1]", "expected one assistant message, got: user"),
        (RELEASE | {"video_name": 7}, "video_name", "expected text, got 7"),
        (RELEASE | {"pos_pre": 7}, "pos_pre", "content must be a string"),
        (RELEASE | {"neg_score": "3"}, "neg_score", "expected a number or null, got '3'"),
    ],
)
def test_errors_name_the_columns_of_the_file(tmp_path, record, column, words):
    file = write(tmp_path / "p.jsonl", record)
    with pytest.raises(PairError) as caught:
        load_pairs(file)
    assert (caught.value.where, caught.value.column) == (f"{file}:1", column)
    assert words in str(caught.value)


def test_answers_that_repeat_the_prompt_read_as_implicit(tmp_path):
    file = write(tmp_path / "p.jsonl", {"prompt": "Who?", "chosen": [USER, ANN], "rejected": [USER, BOB]})
    with pytest.raises(PairError, match="read the file with format 'implicit'"):
        load_pairs(file)
    assert load_pairs(file, "implicit")[0]["prompt"] == [USER]


def test_unused_columns_are_named_once_with_counts(tmp_path, caplog):
    file = write(tmp_path / "p.jsonl", PLAIN | {"idx": 1}, PLAIN | {"idx": 2, "note": "x"}, PLAIN | {"note": None})
    with caplog.at_level(logging.WARNING, logger="synpo.pairs"):
        load_pairs(file)
    assert [record.getMessage() for record in caplog.records] == [
        f"{file}: columns that training does not use, with their counts: 'idx' (2), 'note' (1)"
    ]


def test_chunks_and_parquet_batches_keep_every_pair_in_order(tmp_path):
    records = [{"prompt": f"{i}", "chosen": "a", "rejected": str(i)} for i in range(2003)]
    for name in ("p.jsonl", "p.parquet"):
        dataset = load_pairs(write(tmp_path / name, *records))
        assert [row["rejected"][0]["content"] for row in dataset] == [str(i) for i in range(2003)]
        assert dataset[-1]["source"].endswith(("p.jsonl:2003", "p.parquet row 2003"))


def test_a_normalised_dataset_comes_back_from_parquet(tmp_path):
    source = write(
        tmp_path / "p.jsonl",
        {"messages": [USER, ANN], "rejected_response": "42", "images": ["a.png"], "videos": [["1.png", "2.png"]]},
        {"messages": [USER, ANN], "rejected_response": "null"},
    )
    pairs = load_pairs(source)
    pairs.to_parquet(tmp_path / "out.parquet")
    back = load_pairs(tmp_path / "out.parquet")
    assert back.remove_columns("source")[:] == pairs.remove_columns("source")[:]
    assert back["source"][0] == f"{tmp_path / 'out.parquet'} row 1"


def test_as_pairs_takes_a_dataset_in_memory():
    pairs = as_pairs(Dataset.from_list([PLAIN, PLAIN]), "train_dataset")
    assert pairs[1]["source"] == "train_dataset row 2"
    assert as_pairs(pairs) is pairs
    with pytest.raises(PairError, match="eval_dataset row 1: no known pair format"):
        as_pairs(Dataset.from_list([{"text": "x"}]), "eval_dataset")
    with pytest.raises(TypeError, match="expected a datasets"):
        as_pairs(datasets.DatasetDict({"train": pairs}))


@pytest.mark.parametrize("one_a_row", [True, False])
def test_encoded_images_stay_encoded(tmp_path, one_a_row):
    image = {"bytes": b"png", "path": "a.png"}
    rows = {key: [value] for key, value in PLAIN.items()} | {"images": [image if one_a_row else [image]]}
    feature = datasets.Image() if one_a_row else datasets.List(datasets.Image())
    features = datasets.Features({key: datasets.Value("string") for key in PLAIN} | {"images": feature})
    stored = Dataset.from_dict(rows, features=features)
    stored.to_parquet(tmp_path / "p.parquet")
    for pairs in (as_pairs(stored), load_pairs(tmp_path / "p.parquet")):
        assert pairs[0]["images"] == [{"path": None, "bytes": b"png"}]


def test_nothing_is_written_to_the_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    file = write(tmp_path / "p.jsonl", PLAIN)
    assert load_pairs(file).cache_files == []
    assert not cache.exists()


def test_the_records_shown_in_the_documentation(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    shown = page.split("```json\n")[1].split("```")[0]
    records = [json.loads(record) for record in shown.strip().split("\n\n")]
    formats = ["columns", "columns", "implicit", "sharegpt", "ms-swift", "synpo-release"]
    for name, record in zip(formats, records, strict=True):
        file = write(tmp_path / "p.jsonl", record)
        assert load_pairs(file)[:] == load_pairs(file, name)[:]
