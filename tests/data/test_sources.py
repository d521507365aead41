import sys

import numpy as np
import pytest

from kdjax.data import tfds
from kdjax.data.config import DataConfig
from kdjax.data.examples import to_example
from kdjax.data.python_docs import KINDS, documents
from kdjax.data.sources import open_source
from kdjax.errors import UserError


def records(name):
    source = open_source(name)
    return [source.record(i) for i in range(source.count)], [source.where(i) for i in range(source.count)]


def test_text_is_cut_at_paragraphs_of_some_size(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "words " * 100 for i in range(20)]
    long = "\n".join("line " * 50 for _ in range(100))
    (tmp_path / "a.txt").write_text("\n\n".join([*paragraphs, long, "the end"]))
    (tmp_path / "b.txt").write_text("\n \nshort, ünïcode\r\n")
    (tmp_path / "c.txt").write_text("\n\n")
    found, where = records(f"text:{tmp_path}/*.txt")
    texts = [record["text"] for record in found]
    original = " ".join((tmp_path / "a.txt").read_text().split())
    assert " ".join(" ".join(texts[:-1]).split()) == original
    assert texts[-1] == "short, ünïcode"
    assert all(text.startswith("Paragraph") for text in texts[:5])
    assert max(len(text) for text in texts) < 8_500 and len(texts) > 8
    assert where[0] == f"{tmp_path}/a.txt line 1" and where[1] == f"{tmp_path}/a.txt line 9"


def test_jsonl_rows_and_their_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "é"}\r\n\n  \n{"prompt": "p", "answer": "a"}', "utf-8")
    found, where = records(f"jsonl:{tmp_path}/a.jsonl")
    assert found == [{"text": "é"}, {"prompt": "p", "answer": "a"}]
    assert where == [f"{tmp_path}/a.jsonl line 1", f"{tmp_path}/a.jsonl line 4"]


def test_several_files_are_one_source_in_order(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}1"}}\n{{"text": "{name}2"}}\n')
    texts = [record["text"] for record in records(f"jsonl:{tmp_path}/*.jsonl")[0]]
    assert texts == ["a1", "a2", "b1", "b2", "c1", "c2"]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("text", b"fine\nfine\nca\xe9\n", "a.x line 3: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        ("jsonl", b'{"text": "fine"}\n{"text": "ca\xe9"}\n', "a.x line 2: byte 0xe9 is not UTF-8"),
        ("jsonl", b'{"text": "fine"}\n\n{"text": fine}\n', r"a.x line 3: not a JSON object \(Expecting value"),
        ("jsonl", b'["a"]\n', r"a.x line 1: not a JSON object \(got a list\)"),
        ("jsonl", b"[" * 100_000, r"a.x line 1: not a JSON object \(maximum recursion"),
    ],
)
def test_a_bad_row_is_named(tmp_path, kind, content, message):
    (tmp_path / "a.x").write_bytes(content)
    with pytest.raises(UserError, match=message):
        records(f"{kind}:{tmp_path}/a.x")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jason:x", "unknown data source 'jason:x'; did you mean 'jsonl'"),
        (
            "data.csv",
            "unknown data source 'data.csv'; known: invented, jsonl, parquet, python_docs, python_passages",
        ),
        ("jsonl:/nowhere/*.x", "names no file; write jsonl:PATH"),
        ("text:", "names no file"),
        ("python_docs:3.11", "takes no argument"),
        ("tfds:python_doc", "neither a known builder nor a prepared TFDS directory; did you mean 'python_docs'"),
    ],
)
def test_a_source_that_is_not_there(name, message):
    with pytest.raises(UserError, match=message):
        open_source(name)


def test_empty_files_are_empty_data(tmp_path):
    (tmp_path / "a").write_text("")
    (tmp_path / "b").write_text("\n \n")
    for kind in ("text", "jsonl"):
        with pytest.raises(UserError, match="is empty; give a file with at least one row"):
            open_source(f"{kind}:{tmp_path}/*")


def test_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    parquet.write_table(arrow.table({"text": ["é", None], "n": [1, 2]}), tmp_path / "a.parquet", row_group_size=1)
    parquet.write_table(arrow.table({"messages": [turns]}), tmp_path / "b.parquet")
    found, where = records(f"parquet:{tmp_path}/*.parquet")
    assert found == [{"text": "é", "n": 1}, {"text": None, "n": 2}, {"messages": turns}]
    assert where == [f"{tmp_path}/a.parquet row 1", f"{tmp_path}/a.parquet row 2", f"{tmp_path}/b.parquet row 1"]
    assert to_example(found[2], DataConfig(), "").parts == (("user", "q"), ("assistant", "a"))
    bad = arrow.Array.from_buffers(arrow.string(), 1, arrow.array([b"a\xff"]).buffers())
    parquet.write_table(arrow.table({"text": bad}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="c.parquet row 1: byte 0xff is not UTF-8"):
        records(f"parquet:{tmp_path}/c.parquet")
    (tmp_path / "d.parquet").write_text("no")
    with pytest.raises(UserError, match="d.parquet is no readable Parquet file"):
        open_source(f"parquet:{tmp_path}/d.parquet")


def test_parquet_without_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"kdjax\[parquet\]"):
        open_source("parquet:a")


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """kdjax's own builder, prepared from a few documents."""
    documents = [{"id": f"d{i}", "text": f"tëxt {i}", "label": i % 4} for i in range(10)]
    monkeypatch.setattr(tfds, "documents", lambda: documents)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    open_source("tfds:python_docs")
    return tmp_path


def test_own_tfds_builder_and_prepared_directory_without_tensorflow(prepared, capfd):
    config = DataConfig()
    texts = {to_example(record, config, "").document for record in records("tfds:python_docs")[0]}
    assert texts == {f"tëxt {i}" for i in range(10)}
    (directory,) = (path.parent for path in prepared.glob("**/dataset_info.json"))
    found, where = records(f"tfds:{directory}@train[:30%]")
    assert len(found) == 3 and where[2].endswith("row 3")
    assert isinstance(found[0]["text"], bytes)
    assert "tensorflow" not in sys.modules
    assert capfd.readouterr() == ("", "")


def test_tfds_errors(prepared):
    with pytest.raises(UserError, match="tfds:python_docs@nosuch cannot be read .*Unknown split 'nosuch'"):
        open_source("tfds:python_docs@nosuch")
    with pytest.raises(UserError, match="did you mean .*python_docs/3"):
        open_source(f"tfds:{prepared}")


def test_python_questions():
    source = open_source("python_questions")
    rows = [source.record(i) for i in range(source.count)]
    assert len(rows) > 1000 and len({row["id"] for row in rows}) == len(rows)
    (move,) = [row for row in rows if row["id"] == "shutil.move"]
    assert (move["module"], move["prompt"]) == ("shutil", "What does shutil.move do?")
    assert move["answer"].startswith("Recursively move a file or directory to another location.")
    assert not any(part.startswith("_") for row in rows for part in row["id"].split("."))
    with pytest.raises(UserError, match="python_questions takes no argument"):
        open_source("python_questions:x")


def test_python_passages_are_whole_stretches_of_documents():
    rows = [open_source("python_passages").record(i) for i in range(1000)]
    texts = {row["id"]: row["text"] for row in documents()}
    for row in rows[::50]:
        whole = row["document"] + row["prompt"] + row["answer"]
        assert whole in texts[row["id"].partition("#")[0]] and row["id"].startswith(row["module"])
        assert [len(row[name].split()) for name in ("document", "prompt", "answer")] == [72, 4, 20]


def test_python_docs():
    before = set(sys.modules)
    found, where = records("python_docs")
    again = list(documents.__wrapped__())
    assert {"antigravity", "this", "turtle"}.isdisjoint(set(sys.modules) - before)
    assert found == again
    texts = {record["id"]: record["text"] for record in found}
    assert texts["json.decoder.JSONDecoder.raw_decode"].startswith("Decode a JSON document from")
    assert "assert" in texts["topics.assert"]
    assert len({record["text"] for record in found}) == len(found) > 5_000
    labels = {record["id"]: KINDS[record["label"]] for record in found}
    assert labels["topics.assert"] == "topic" and labels["json.decoder"] == "module"
    assert labels["json.decoder.JSONDecoder"] == "class" and labels["json.decoder.JSONDecoder.raw_decode"] == "function"
    assert where[0] == f"python_docs {found[0]['id']}"
    assert not any(name.split(".")[0] in {"test", "idlelib", "site-packages"} for name in texts)
    assert np.sum([len(text) for text in texts.values()]) > 1_500_000
