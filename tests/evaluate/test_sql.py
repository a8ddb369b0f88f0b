"""WikiSQL: structure → text → structure, scores equal to the official evaluator's, hostile SQL harmless and wrong."""

from __future__ import annotations

import bz2
import json
import shutil
import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.example import Example, Examples
from rankwise.data.sources.load import load
from rankwise.data.sources.wikisql import AGGREGATES, Query, same_query
from rankwise.errors import DataError
from rankwise.evaluate.sql import LONGEST, parse_query, score_sql, without_quotes
from rankwise.evaluate.sql_database import Database, QueryRefused, Stopped, build_database

HEADER = ("Player", "No.", "School/Club Team", "Yards, total = sum", "Max Speed", "Team and Year", "Player Name")


def write(folder: Path, rows: list[dict[str, Any]], tables: list[dict[str, Any]]) -> Path:
    for name, content in (("dev.jsonl", rows), ("dev.tables.jsonl", tables)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder / "dev.jsonl"


TABLE = {
    "id": "1-22-3",
    "header": ["Name", "Points", "Team and Year"],
    "types": ["text", "real", "text"],
    "rows": [["Ann LEE", 3, "Reds 1999"], ["Bob", "1,200", "Blues 2000"], ["Cid", 7.5, "reds 1999"]],
}


def question(sql: dict[str, Any]) -> dict[str, Any]:
    return {"phase": 1, "table_id": "1-22-3", "question": "What?", "sql": sql}


@pytest.fixture
def small(tmp_path: Path) -> Examples:
    queries = [
        {"sel": 0, "agg": 0, "conds": [[1, 1, 5]]},
        {"sel": 1, "agg": 1, "conds": [[2, 0, "Reds 1999"], [1, 2, "7.6"]]},
        {"sel": 0, "agg": 3, "conds": []},
    ]
    return load("wikisql", write(tmp_path, [question(sql) for sql in queries], [TABLE]))


# --- text --------------------------------------------------------------------------------------------------------


def test_the_text_is_that_of_the_specification() -> None:
    header = ("Player", "No.")
    assert Query(0, 0).text(header) == "SELECT Player FROM table"
    query = Query.of({"sel": 0, "agg": 3, "conds": [[1, 0, 3], [0, 2, "Ann and Bob"]]})
    assert query.text(header) == "SELECT COUNT(Player) FROM table WHERE No. = 3 AND Player < Ann and Bob"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SELECT Player FROM table", Query(0, 0)),
        ("select  PLAYER\nfrom table;", Query(0, 0)),
        ("SELECT Player Name FROM table", Query(6, 0)),
        ("SELECT Max Speed FROM table", Query(4, 0)),
        ("SELECT MAX(No.) FROM table", Query(1, 1)),
        ("SELECT COUNT Player FROM 1-1000181-1", Query(0, 3)),
        ('SELECT avg ( "No." ) FROM table', Query(1, 5)),
        (
            "SELECT Player FROM table WHERE Yards, total = sum > 5 AND Team and Year = x and y",
            Query(0, 0, ((3, 1, "5"), (5, 0, "x and y"))),
        ),
        ("SELECT Player FROM table WHERE No.=3", Query(0, 0, ((1, 0, "3"),))),
        ("SELECT Player FROM table WHERE No. = =5", Query(0, 0, ((1, 0, "=5"),))),
        ("SELECT Player FROM table WHERE No. OP x", Query(0, 0, ((1, 3, "x"),))),
    ],
)
def test_texts_that_state_a_query(text: str, expected: Query) -> None:
    assert parse_query(text, HEADER) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Player",
        "SELECT Coach FROM table",
        "SELECT * FROM table",
        "SELECT Player, No. FROM table",
        "SELECT MAX(No. FROM table",
        "SELECT Player FROM table WHERE",
        "SELECT Player FROM table WHERE No. >= 3",
        "SELECT Player FROM table WHERE No. = ",
        "SELECT Player FROM table WHERE Coach = 3",
        "SELECT Player FROM table ORDER BY No.",
        "SELECT Player FROM table; DROP TABLE table",
        "DROP TABLE table_1_22_3",
        "ATTACH DATABASE '/tmp/x' AS x",
        "SELECT Player FROM table WHERE No. = " + "x" * LONGEST,
        "SELECT Player FROM table WHERE " + " AND ".join(["No. = 1"] * 50),
    ],
)
def test_texts_that_state_none(text: str) -> None:
    assert parse_query(text, HEADER) is None


def test_a_text_full_of_conditions_takes_no_time() -> None:
    started = time.perf_counter()
    parse_query(("SELECT Player FROM table WHERE " + "No. = 1 AND " * 500)[:LONGEST], HEADER)
    assert parse_query("SELECT Player FROM table WHERE No. =" + " and" * 1000, HEADER)
    assert time.perf_counter() - started < 2


NAMES = st.text("ABCdef0 ./%,()-'#é", min_size=1, max_size=12).map(lambda name: " ".join(name.split())).filter(bool)
VALUES = st.one_of(st.text("abcXYZ0 .,'\"/-éß", min_size=1, max_size=15).map(str.strip).filter(bool), st.integers())


@st.composite
def queries(draw: st.DrawFn) -> tuple[tuple[str, ...], Query]:
    header = tuple(draw(st.lists(NAMES, min_size=1, max_size=6, unique_by=str.casefold)))
    column = st.integers(0, len(header) - 1)
    conditions = st.lists(st.tuples(column, st.integers(0, 2), VALUES), max_size=4)
    return header, Query(draw(column), draw(st.integers(0, len(AGGREGATES) - 1)), tuple(draw(conditions)))


@given(queries())
def test_a_query_survives_its_text(case: tuple[tuple[str, ...], Query]) -> None:
    header, query = case
    found = parse_query(query.text(header), header)
    assert found is not None
    as_texts = tuple((column, operator, str(value)) for column, operator, value in query.conditions)
    assert found == replace(query, conditions=as_texts)


def test_every_official_query_survives_its_text(shared_data: Path, tmp_path: Path) -> None:
    derived = shared_data / "wikisql" / "derived"
    shutil.copyfile(shared_data / "wikisql" / "data" / "dev.jsonl", tmp_path / "dev.jsonl")
    shutil.copyfile(derived / "dev.tables.partial.jsonl", tmp_path / "dev.tables.jsonl")
    files = {derived / "train.subset.jsonl": 984, derived / "train.sample.jsonl": 5, tmp_path / "dev.jsonl": 8421}
    for file, rows in files.items():
        examples = load("wikisql", file)
        assert len(examples) == rows
        for example in examples:
            found = parse_query(example.answer, example.facts["header"])
            assert found is not None and same_query(found, Query.of(example.facts["sql"])), example.answer


def test_quotation_marks_are_dropped_unless_the_official_value_has_them(tmp_path: Path) -> None:
    assert without_quotes(Query(0, 0, ((1, 0, "'it''s'"), (1, 0, '"'), (1, 0, 3)))).conditions == (
        (1, 0, "it's"),
        (1, 0, '"'),
        (1, 0, 3),
    )
    rows = [question({"sel": 0, "agg": 0, "conds": [[2, 0, value]]}) for value in ("Reds 1999", '"Reds" 1999', '"x"')]
    examples = load("wikisql", write(tmp_path, rows, [TABLE]))
    texts = [f"SELECT Name FROM table WHERE Team and Year = {v}" for v in ("'reds 1999'", '"Reds" 1999', '"X"')]
    assert score_sql(texts, examples.items).metrics["logical_form"] == 100


# --- logical form ------------------------------------------------------------------------------------------------


def test_logical_form_equals_the_official_evaluator(shared_data: Path) -> None:
    """Two published figures of these predictions: 0.45208 by the evaluator as it is since 2018-08-08, and 0.35376 in
    the README, which is older: then conditions had an order and numbers were not texts."""
    folder = shared_data / "wikisql"
    gold = [Query.of(json.loads(line)["sql"]) for line in (folder / "data" / "dev.jsonl").read_text().splitlines()]
    with bz2.open(folder / "example.pred.dev.jsonl.bz2", "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    found = [None if row["error"] else Query.of(row["query"]) for row in rows]
    pairs = [(query, sql) for query, sql in zip(found, gold, strict=True) if query]
    assert len(gold) == 8421
    assert sum(same_query(*pair) for pair in pairs) / 8421 == 0.45208407552547203
    assert sum(_lower(query) == _lower(sql) for query, sql in pairs) / 8421 == 0.35375846099038116


def _lower(query: Query) -> Query:
    conditions = [(left, kind, v.lower() if isinstance(v, str) else v) for left, kind, v in query.conditions]
    return replace(query, conditions=tuple(conditions))


def test_the_order_of_conditions_and_the_case_of_values_do_not_matter() -> None:
    one, other = ((1, 0, "A b"), (0, 1, 3)), ((0, 1, "3"), (1, 0, "a B"))
    assert same_query(Query(0, 0, one), Query(0, 0, other))
    assert not same_query(Query(0, 0, one), Query(0, 0, other[:1]))
    assert not same_query(Query(0, 0, ((0, 0, 3),)), Query(0, 0, ((0, 0, 3.0),)))  # as the official evaluator: texts


@pytest.mark.parametrize(
    "content",
    [
        None,
        {"sel": 0, "agg": 0},
        {"sel": "0", "agg": 0, "conds": []},
        {"sel": True, "agg": 0, "conds": []},
        {"sel": 0, "agg": 6, "conds": []},
        {"sel": 0, "agg": 0, "conds": [[0, 4, "x"]]},
        {"sel": 0, "agg": 0, "conds": [[0, 0]]},
        {"sel": 0, "agg": 0, "conds": [[0, 0, None]]},
        {"sel": -1, "agg": 0, "conds": []},
    ],
)
def test_other_structures_are_no_queries(content: Any) -> None:
    with pytest.raises(ValueError):
        Query.of(content)


# --- execution ---------------------------------------------------------------------------------------------------


def test_scores_of_right_equal_and_wrong_queries(small: Examples) -> None:
    texts = [
        "SELECT Name FROM table WHERE Points > 5.0",  # other form, same rows
        "select max(Points) from table where points < 7.6 and Team and Year = REDS 1999",  # same form, other text
        "SELECT COUNT(Name) FROM table WHERE Points > 3",
    ]
    scores = score_sql(texts, small.items)
    assert scores.metrics == pytest.approx(
        {"exact_match": 0, "logical_form": 100 / 3, "execution_accuracy": 200 / 3}, abs=1e-9
    )
    assert scores.n == 3 and set(scores.intervals) == set(scores.metrics)
    assert "built from dev.tables.jsonl" in scores.details["execution_accuracy"]
    perfect = score_sql([example.answer for example in small], small.items)
    assert set(perfect.metrics.values()) == {100.0}
    assert perfect.details["wrong"] == {"no query": 0}


def test_the_official_quirks_of_values(tmp_path: Path) -> None:
    path = build_database(write(tmp_path, [], [TABLE]).with_suffix(".tables.jsonl"), tmp_path / "dev.db")
    with Database(path) as database:
        ask = lambda query: database.answer("1-22-3", query)  # noqa: E731
        assert ask(Query(0, 0, ((1, 0, "3"),))) == ["ann lee"]  # text against a real column
        assert ask(Query(0, 0, ((1, 0, "about 7.5 points"),))) == ["cid"]  # the first number in it
        assert ask(Query(0, 0, ((2, 0, "REDS 1999"),))) == ["ann lee", "cid"]
        assert ask(Query(0, 0, ((1, 1, 3), (1, 2, 8)))) == ["cid"]  # two conditions on one column
        assert ask(Query(1, 4, ((2, 0, "reds 1999"),))) == [10.5]
        for query in (Query(0, 0, ((1, 0, "none"),)), Query(7, 0), Query(0, 0, ((0, 3, "x"),))):
            with pytest.raises(QueryRefused):
                ask(query)
        with pytest.raises(QueryRefused, match="no table table_9_9"):
            database.answer("9-9", Query(0, 0))
        with pytest.raises(QueryRefused):
            ask(Query(0, 0, ((0, 0, "\ud800"),)))


def test_an_official_database_is_preferred_and_left_as_it_was(small: Examples, tmp_path: Path) -> None:
    other = TABLE | {"rows": [["ann lee", 8, "reds 1999"]]}
    (tmp_path / "other.tables.jsonl").write_text(json.dumps(other))
    path = build_database(tmp_path / "other.tables.jsonl", tmp_path / "dev.db")
    before = path.read_bytes()
    examples = load("wikisql", tmp_path / "dev.jsonl")
    scores = score_sql(["SELECT Name FROM table"] * 3, examples.items)
    assert scores.details["execution_accuracy"] == "equal results on dev.db"
    assert scores.metrics["execution_accuracy"] == pytest.approx(100 / 3)  # one row there, so `Points > 5` finds it
    assert path.read_bytes() == before


def test_execution_on_the_whole_tables_at_hand(shared_data: Path) -> None:
    examples = load("wikisql", shared_data / "wikisql" / "derived" / "train.sample.jsonl")
    scores = score_sql([example.answer for example in examples], examples.items)
    assert scores.metrics["execution_accuracy"] == 100
    header = examples[0].facts["header"]
    lost = score_sql([f"SELECT {header[0]} FROM table"] * len(examples), examples.items)
    assert lost.metrics["execution_accuracy"] == 0


def test_headers_without_rows_are_refused_for_execution(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "wikisql" / "derived"
    examples = load("wikisql", folder / "dev.subset.jsonl")
    scores = score_sql([example.answer for example in examples], examples.items)
    assert set(scores.metrics) == {"exact_match", "logical_form"}
    assert "only a header" in scores.unavailable["execution_accuracy"]
    with pytest.raises(DataError, match="line 1: the table 1-10015132-11 has no rows"):
        build_database(folder / "dev.tables.partial.jsonl", tmp_path / "x.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id": "x; DROP"}, "an id like"),
        ({"types": ["text", "real", "blob"]}, "text or real"),
        ({"rows": [["a"]]}, "another length"),
        ({"id": "1-2-2"}, "lacks 1 of the tables, 1-22-3"),
    ],
)
def test_broken_tables_build_no_database(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    tables = tmp_path / "t.tables.jsonl"
    tables.write_text(json.dumps(TABLE | change) + "\n")
    with pytest.raises(DataError, match=reason):
        build_database(
            tables, tmp_path / "x.db", None if "id like" in reason else {"1-22-3", str((TABLE | change)["id"])}
        )
    assert not (tmp_path / "x.db").exists()


def test_a_database_of_other_tables_makes_no_score(small: Examples, tmp_path: Path) -> None:
    (tmp_path / "o.tables.jsonl").write_text(json.dumps(TABLE | {"id": "9-9"}))
    path = build_database(tmp_path / "o.tables.jsonl", tmp_path / "o.db")
    scores = score_sql(["x"] * 3, small.items, database=path)
    assert "has no table table_1_22_3" in scores.unavailable["execution_accuracy"]
    (tmp_path / "broken.db").write_bytes(b"no database" * 100)
    for name, reason in (("broken.db", "not a database"), ("none.db", "no such database")):
        scores = score_sql(["x"] * 3, small.items, database=tmp_path / name)
        assert reason in scores.unavailable["execution_accuracy"]
    with pytest.raises(DataError, match="nothing to score"):
        score_sql([], [])


# --- hostile -----------------------------------------------------------------------------------------------------

HOSTILE = [
    "DROP TABLE table_1_22_3",
    "DELETE FROM table_1_22_3",
    "INSERT INTO table_1_22_3 VALUES (1, 2, 3)",
    "UPDATE table_1_22_3 SET col0 = 1",
    "CREATE TABLE x (a)",
    "CREATE TEMP TABLE x (a)",
    "ATTACH DATABASE '{folder}/stolen.db' AS x",
    "VACUUM INTO '{folder}/stolen.db'",
    "PRAGMA writable_schema = ON",
    "BEGIN EXCLUSIVE",
    "SELECT load_extension('{folder}/x.so')",
    "SELECT writefile('{folder}/stolen', 'x')",
    "SELECT hex(randomblob(1000000000))",
    "SELECT * FROM sqlite_master",
    "WITH RECURSIVE x(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM x) SELECT count(*) FROM x",
    "SELECT 1; DROP TABLE table_1_22_3",
]


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    rows = [[f"name {number}", number, "x"] for number in range(1000)]
    (tmp_path / "wide.tables.jsonl").write_text(json.dumps(TABLE | {"rows": rows}))
    return build_database(tmp_path / "wide.tables.jsonl", tmp_path / "wide.db")


@pytest.mark.parametrize("statement", HOSTILE)
def test_hostile_statements_are_refused_and_change_nothing(wide: Path, statement: str) -> None:
    before, files = wide.read_bytes(), sorted(wide.parent.iterdir())
    with Database(wide, seconds=0.5) as database:
        with pytest.raises(QueryRefused):
            database.run(statement.format(folder=wide.parent))
        assert database.run("SELECT count(col0) FROM table_1_22_3") == [(1000,)]
    assert wide.read_bytes() == before
    assert sorted(wide.parent.iterdir()) == files


def test_endless_and_huge_queries_are_stopped_in_time(wide: Path) -> None:
    product = "FROM table_1_22_3 a, table_1_22_3 b, table_1_22_3 c"
    with Database(wide, seconds=0.3) as database:
        started = time.perf_counter()
        for statement in (f"SELECT count(a.col0) {product} WHERE a.col1 + b.col1 < c.col1", f"SELECT a.col0 {product}"):
            with pytest.raises(Stopped):
                database.run(statement)
        with pytest.raises(QueryRefused):
            database.run("SELECT col0 FROM table_1_22_3 WHERE col0 = ?", ["x" * 10**8])
        assert time.perf_counter() - started < 5
        assert database.run("SELECT max(col1) FROM table_1_22_3") == [(999.0,)]


def test_the_file_itself_is_opened_read_only(wide: Path) -> None:
    with Database(wide) as database:
        database._connection.set_authorizer(None)
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            database._connection.execute("DELETE FROM table_1_22_3")


def test_hostile_predictions_are_wrong_and_counted(small: Examples) -> None:
    texts = ["DROP TABLE table_1_22_3", "SELECT Name FROM table WHERE Points = many", "x" * 10**7]
    scores = score_sql(texts, small.items)
    assert set(scores.metrics.values()) == {0.0}
    assert scores.details["wrong"] == {"no query": 2, "refused": 1}


def test_a_slow_prediction_is_wrong_and_counted(small: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Database.answer

    def slow(database: Database, table: str, query: Query) -> list[Any]:
        if query.aggregate == 5:
            return [database.run("SELECT count(a.col0) FROM table_1_22_3 a" + ", table_1_22_3" * 30)]
        return answer(database, table, query)

    monkeypatch.setattr(Database, "answer", slow)
    scores = score_sql(
        ["SELECT AVG(Points) FROM table"] + [e.answer for e in small.items[1:]], small.items, seconds=0.2
    )
    assert scores.details["wrong"] == {"no query": 0, "stopped": 1}
    assert scores.metrics["execution_accuracy"] == pytest.approx(200 / 3)


def test_columns_with_one_name_are_one_to_a_text(tmp_path: Path) -> None:
    table = TABLE | {"header": ["Name", "Points", "name"]}
    [example] = load("wikisql", write(tmp_path, [question({"sel": 2, "agg": 0, "conds": []})], [table]))
    assert isinstance(example, Example)
    assert score_sql(["SELECT Name FROM table"], [example]).metrics["logical_form"] == 100
