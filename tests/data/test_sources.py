"""Data sources: the official files are read whole, bad rows are named by line, nothing is made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankwise.data.example import Example, one_per_prompt
from rankwise.data.sources.load import load
from rankwise.data.sources.table import kind_of
from rankwise.errors import DataError, UsageError
from rankwise.options.sections import DataSection

E2E = "mr,ref\r\n"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(example: Example) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in example.turns]


# --- E2E ---------------------------------------------------------------------------------------------------------


def test_e2e_reads_the_official_rows_and_groups(shared_data: Path) -> None:
    train, dev = (load("e2e_nlg", shared_data / "e2e_nlg", split) for split in ("train", "dev"))
    assert (len(train), len({e.group for e in train})) == (42061, 4862)
    assert (len(dev), len(one_per_prompt(dev))) == (4672, 547)
    assert sum(len(e.references) for e in one_per_prompt(dev)) == 4672
    assert not {e.group for e in train} & {e.group for e in dev}


def test_e2e_cleaned_is_the_same_task(shared_data: Path) -> None:
    rows = load("e2e_nlg", shared_data / "e2e_nlg_cleaned" / "devel-fixed.no-ol.csv")
    assert len(rows) == 4299
    assert rows[0].turns[1].text == "name[Alimentum], area[city centre], familyFriendly[no]"


def test_e2e_columns_by_name_quoted_line_breaks_and_accents(tmp_path: Path) -> None:
    file = write(tmp_path / "x.csv", '\ufeffref,extra,MR\r\n"Two\r\nlines, £5",1,"name[Café]"\r\nsecond,2,b\r\n')
    first, second = load("e2e_nlg", file)
    assert texts(first)[1:] == [("user", "name[Café]"), ("assistant", "Two\r\nlines, £5")]
    assert (first.id, second.id) == ("x-2", "x-4")  # the line on which each record starts


def test_e2e_shares_references_between_rows_of_one_mr(tmp_path: Path) -> None:
    rows = load("e2e_nlg", write(tmp_path / "x.csv", E2E + "a,one\nb,other\na,two\n"))
    assert [e.references for e in rows] == [("one", "two"), ("other",), ("one", "two")]
    assert [e.answer for e in one_per_prompt(rows)] == ["one", "other"]


@pytest.mark.parametrize(
    ("body", "line", "reason"),
    [
        (b"a,one\r\nb\r\n", 3, "1 fields, the header has 2"),
        (b'"a\r\nx",one\r\nb,\r\n', 4, "empty ref"),
        (b"a,one\r\n,two\r\n", 3, "empty mr"),
        (b"a,one\r\nb,\xff\r\nc,three\r\n", 3, "not UTF-8"),
        (b'a,one\r\n"b"x,two\r\n', 3, "not valid CSV"),
        (b"a,one\r\nb," + b"x" * 200_000 + b"\r\n", 3, "field larger"),
    ],
)
def test_bad_csv_rows_are_named_or_skipped_and_counted(tmp_path: Path, body: bytes, line: int, reason: str) -> None:
    file = write(tmp_path / "x.csv", E2E.encode() + body)
    with pytest.raises(DataError, match=rf"x\.csv, line {line}: .*{reason}"):
        load("e2e_nlg", file)
    kept = load("e2e_nlg", file, how=DataSection(skip_bad=True))
    assert kept[0].answer == "one"
    assert len(kept.skipped) == 1
    assert f"line {line}" in kept.notes()[0]


def test_wrong_columns_and_empty_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column ref .*testset_w_refs"):
        load("e2e_nlg", write(tmp_path / "testset.csv", "MR\nname[x]\n"))
    for content in ("", E2E):
        with pytest.raises(DataError, match="no usable samples"):
            load("e2e_nlg", write(tmp_path / "empty.csv", content))


# --- where a path leads ------------------------------------------------------------------------------------------


def test_a_folder_is_searched_by_official_names(tmp_path: Path) -> None:
    write(tmp_path / "devset.csv", E2E + "a,one\n")
    assert load("e2e_nlg", tmp_path, "validation").files == (tmp_path / "devset.csv",)
    with pytest.raises(DataError, match=r"train split of e2e_nlg: looked for trainset\.csv"):
        load("e2e_nlg", tmp_path, "train")


def test_a_missing_file_is_an_error_and_never_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.data.sources.load.hf_hub_download", lambda *_, **__: pytest.fail("network"))
    for path in ("data/cota_train.json", str(tmp_path / "nowhere"), "data/rows.csv"):
        with pytest.raises(DataError, match="does not exist"):
            load("cota", path)


def test_a_hub_id_is_fetched_by_official_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "devset.csv", E2E + "a,one\n")
    asked: list[Any] = []

    def download(repository: str, name: str, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return str(file)

    monkeypatch.setattr("rankwise.data.sources.load.hf_hub_download", download)
    assert len(load("e2e_nlg", "someone/e2e_nlg", "dev")) == 1
    assert asked == [("someone/e2e_nlg", "devset.csv", "dataset")]


def test_a_hub_id_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise FileNotFoundError("cannot find the requested files; check your connection")

    monkeypatch.setattr("rankwise.data.sources.load.hf_hub_download", download)
    with pytest.raises(DataError, match=r"devset\.csv: cannot find(.|\n)*pass the path of the official file"):
        load("e2e_nlg", "someone/e2e_nlg", "dev")


def test_unknown_names_suggest_near_ones() -> None:
    with pytest.raises(UsageError, match="e2e_nlg"):
        load("e2e_nl", "x")
    with pytest.raises(UsageError, match="validation"):
        load("e2e_nlg", "x", "trian")


# --- CoTA --------------------------------------------------------------------------------------------------------

COTA = {
    "id": 7,
    "task_type": "count",
    "image": "a.jpg",
    "question": "How many?",
    "chain_of_thought": ["Look.", "Count."],
    "actions": [{"action": "zoom", "params": {"x": 1}}],
    "answer": 2,
}


@pytest.mark.parametrize("form", ["list", "data", "lines"])
def test_cota_in_every_form(tmp_path: Path, form: str) -> None:
    rows = [COTA, {"question": "Why?", "answer": "So."}]
    content = {
        "list": json.dumps(rows, indent=1),
        "data": json.dumps({"version": [1], "data": rows}),
        "lines": "\n\n".join(map(json.dumps, rows)),
    }
    file = write(tmp_path / ("c.jsonl" if form == "lines" else "c.json"), content[form])
    first, second = load("cota", file)
    assert (first.id, first.group, first.stratum, first.images) == ("7", "a.jpg", "count", ("a.jpg",))
    assert first.answer == 'Thought: Look.\nThought: Count.\nAction: zoom {"x": 1}\nAnswer: 2'
    assert (second.id, second.stratum, second.answer, second.references) == (
        "c-2",
        None,
        "Answer: So.",
        ("Answer: So.",),
    )


def test_samples_with_images_are_counted_for_a_text_run(tmp_path: Path) -> None:
    rows = load("cota", write(tmp_path / "c.json", json.dumps([COTA, {**COTA, "id": 8, "image": None}])))
    assert "1 of 2 samples have images" in rows.notes()[0]
    assert rows.notes(sees_images=True) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": ""}, "question must be a text"),
        ({"answer": None}, "answer must be a text"),
        ({"chain_of_thought": [1]}, "chain_of_thought must be"),
        ({"actions": ["zoom"]}, "actions must be"),
    ],
)
def test_bad_cota_rows_name_line_and_sample(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    rows = [COTA, COTA | {"id": 8} | change]
    file = write(tmp_path / "c.json", "[\n" + ",\n\n".join(map(json.dumps, rows)) + "\n]")
    with pytest.raises(DataError, match=rf"c\.json, line 4: sample \d: {reason}"):
        load("cota", file)
    assert len(load("cota", file, how=DataSection(skip_bad=True))) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.json", '[\n{"question": "a",\n]', r"line 3, column 1: not JSON"),
        ("c.json", '{"question": "a"}\n{"question": "b"}', r"name the file \.jsonl"),
        ("c.json", '{"rows": []}', "expected a JSON list"),
        ("c.json", "[]", "no usable samples"),
        ("c.jsonl", "", "no usable samples"),
        (
            "c.jsonl",
            '{"question": "a", "answer": "b"}\n[1]\n',
            "line 2: a sample must be a JSON object, this is a list",
        ),
        ("c.jsonl", '{"question": "a", "answer": "b"}\n\n{"qu', "line 3: not valid JSON"),
        ("c.json", b'[\n"\xff"]', "line 2: not UTF-8"),
    ],
)
def test_broken_json_is_located(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load("cota", write(tmp_path / name, content))


def test_an_endless_line_is_refused_before_it_fills_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.data.sources.rows.LONGEST_LINE", 50)
    with pytest.raises(DataError, match="line 2: longer than 50 bytes"):
        load("cota", write(tmp_path / "c.jsonl", '{"question": "a", "answer": "b"}\n' + " " * 60))


# --- conversations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}], "system_prompt": "Be."},
        {"messages": [{"role": r, "content": c} for r, c in [("system", "Be."), ("user", "Hi"), ("assistant", "Yo")]]},
        {
            "system": "Be.",
            "image": None,
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": "Hi"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Yo"}]},
            ],
        },
    ],
)
def test_conversation_forms_read_alike(tmp_path: Path, row: dict[str, Any]) -> None:
    [example] = load("conversations", write(tmp_path / "c.json", json.dumps([row])))
    assert texts(example) == [("system", "Be."), ("user", "Hi"), ("assistant", "Yo")]
    assert example.references == ("Yo",)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([("robot", "x")], 'unknown role "robot"; --roles says who it is: robot=assistant'),
        ([("human", "Hi"), ("gpt", " ")], "text must be|empty turn"),
        ([("human", "Hi"), ("gpt", "")], "empty turn"),
        ([("human", "Hi")], "end with the assistant"),
        ([("gpt", "Yo"), ("human", "Hi")], "no answer is learnt"),
        ([], "needs a list of turns"),
    ],
)
def test_bad_conversations_name_the_sample(tmp_path: Path, turns: list[tuple[str, str]], reason: str) -> None:
    row = {"id": "s1", "conversations": [{"from": who, "value": text} for who, text in turns]}
    with pytest.raises(DataError, match=f"line 1: sample s1: .*({reason})"):
        load("conversations", write(tmp_path / "c.jsonl", json.dumps(row)))


def test_real_conversation_files(shared_data: Path) -> None:
    counts = {
        "lmms_finetune_example/single_image_has_text_only.json": (4, 2),
        "lmms_finetune_example/celeba_image_train.json": (90, 90),
        "llama_factory_mllm_demo/data/mllm_demo.json": (6, 6),
        "llama_factory_mllm_demo/data/v1_multimodal_demo.jsonl": (24, 24),
        "qwen_vl_finetune_demo/demo/single_images.json": (3, 3),
    }
    for name, expected in counts.items():
        rows = load("conversations", shared_data / "llava" / name)
        assert (len(rows), rows.with_images) == expected


# --- which source ---------------------------------------------------------------------------------------------------

ROWS = {
    "cota": {"question": "Why?", "answer": "So."},
    "samsum": {"id": "1", "dialogue": "A: hi", "summary": "They greet."},
    "wikisql": {"phase": 1, "question": "How?", "sql": {}, "table_id": "1-1"},
    "multi_nli": {"gold_label": "neutral", "sentence1": "a", "sentence2": "b", "pairID": "1"},
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("form", ["{}.json", "{}.jsonl", "data.json"])
def test_the_columns_of_a_row_say_which_source_it_is(tmp_path: Path, name: str, form: str) -> None:
    content = json.dumps(ROWS[name] if form.endswith("jsonl") else [ROWS[name]])
    assert kind_of(write(tmp_path / form.format("rows"), content)) == name


def test_conversations_are_told_before_anything_that_they_carry(tmp_path: Path) -> None:
    for turns in ("messages", "conversations"):
        assert kind_of(write(tmp_path / f"{turns}.json", json.dumps([ROWS["cota"] | {turns: []}]))) == "conversations"
    assert kind_of(write(tmp_path / "other.json", '[{"prompt": "a", "completion": "b"}]')) == "conversations"


def test_official_files_say_which_source_a_folder_is(tmp_path: Path) -> None:
    write(tmp_path / "a" / "trainset.csv", "mr,ref\nname[A],A.\n")
    write(tmp_path / "b" / "train.json", json.dumps([ROWS["samsum"]]))
    write(tmp_path / "c" / "train.json", json.dumps([{"messages": []}]))
    write(tmp_path / "d" / "corpus.7z", "")
    write(tmp_path / "e" / "train.tsv", "index\tsentence1\tsentence2\tgold_label\n1\ta\tb\tneutral\n")
    found = [kind_of(tmp_path / name) for name in "abcde"]
    assert found == ["e2e_nlg", "samsum", "conversations", "samsum", "multi_nli"]


def test_a_name_is_taken_where_there_is_nothing_to_look_into(tmp_path: Path) -> None:
    assert [
        kind_of(tmp_path / "samsum"),
        kind_of("someone/wikisql"),
        kind_of("x/rows.jsonl"),
        kind_of("x/rows.csv"),
    ] == [
        "samsum",
        "wikisql",
        "conversations",
        None,
    ]
    with pytest.raises(DataError, match=r"rows\.json, line 1.*not JSON"):
        kind_of(write(tmp_path / "rows.json", "[{"))


def test_the_real_files_are_told(shared_data: Path) -> None:
    for name in ("e2e_nlg", "samsum", "wikisql"):
        assert kind_of(shared_data / name) == name
