import json
import random

import pytest

from kdjax.data.config import DataConfig
from kdjax.data.holdout import ngrams, split_documents
from kdjax.data.sources import open_source
from kdjax.errors import UserError


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def split(path, **settings):
    """Return (training texts, held-out texts in order, the split) of a file of texts."""
    config = DataConfig(sources=(f"jsonl:{path}",), **settings)
    source = open_source(config.sources[0])
    found = split_documents([source], config)
    train = [source.record(int(row))["text"] for rows in found.train for _, row in rows]
    return train, [source.record(int(row))["text"] for _, row in found.held_out], found


TEXTS = [f"document {i} about {i * 7} and {i * 13}" for i in range(2000)]


def test_a_document_is_held_out_for_its_text_alone(tmp_path):
    train, held, found = split(write(tmp_path / "a", TEXTS), eval_fraction=0.1)
    assert sorted([*train, *held]) == sorted(TEXTS)
    assert 140 < len(held) < 260
    assert (found.held_out_documents, found.held_out_dropped) == (len(held), 0)
    mixed = random.Random(1).sample(TEXTS, len(TEXTS))
    train_again, held_again, found_again = split(write(tmp_path / "b", mixed), eval_fraction=0.1)
    assert held_again == held
    assert sorted(train_again) == sorted(train)
    assert found_again.sha256 != found.sha256
    assert split(tmp_path / "a", eval_fraction=0.1, split_seed=1)[1] != held


def test_only_as_much_is_kept_as_an_evaluation_reads(tmp_path):
    _, held, found = split(write(tmp_path / "a", TEXTS), eval_fraction=0.1, eval_tokens=10)
    assert 0 < len(held) < 10 < found.held_out_documents
    assert held == split(tmp_path / "a", eval_fraction=0.1)[1][: len(held)]


def test_nothing_held_out(tmp_path):
    train, held, _ = split(write(tmp_path / "a", TEXTS), eval_fraction=0)
    assert (len(train), held) == (2000, [])


def test_overlap_with_training_text_is_dropped(tmp_path):
    _, held, _ = split(write(tmp_path / "a", TEXTS), eval_fraction=0.1)
    shared = "One two three, four five six seven eight nine ten eleven twelve thirteen"
    # A training document that repeats 13 words of a held-out one, and a short one equal but for case and punctuation.
    long, short, near = f"{shared} {held[0]}", held[1], held[2]
    candidates = [f"{shared.upper()}! {i}" for i in range(50)] + [long]
    texts = [text for text in TEXTS if text != near] + candidates + [f"{short.upper()}!?", near]
    train, kept, found = split(write(tmp_path / "b", texts), eval_fraction=0.1)
    assert any(shared.upper() in text for text in train)
    assert not any(shared.casefold() in text.casefold() for text in kept)
    if f"{short.upper()}!?" in train:
        assert short not in kept
    assert near in kept
    every = split(tmp_path / "b", eval_fraction=0.1, dedupe_ngram=0)[1]
    assert found.held_out_dropped == len(every) - len(kept) > 0
    grams = {gram for text in train for gram in ngrams(text, 13)}
    assert all(bool(ngrams(text, 13) & grams) == (text not in kept) for text in every)


def test_ngrams():
    words = [str(i) for i in range(15)]
    assert ngrams(", ".join(words), 13) == {tuple(words[i : i + 13]) for i in range(3)}
    assert ngrams("Short, TEXT!", 13) == {("short", "text")}


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        (['{"text": " "}', '{"text": ""}'], {}, "no document left to train on"),
        (['{"text": "a"}'], {"eval_fraction": 0.001}, "no document is left to evaluate on.*raise data.eval_fraction"),
        (['{"text": "a"}', "{"], {}, "line 2: not a JSON object.*data.max_bad_rows"),
        (['{"text": "a"}', "3", "{}", "4"], {"max_bad_rows": 2}, "line 4: not a JSON object.*after 2 bad rows"),
        (['{"tex": "a"}'], {}, "line 1 has no field 'text'.*did you mean 'tex'"),
    ],
)
def test_bad_and_empty_rows(tmp_path, lines, settings, message):
    (tmp_path / "a").write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        split(tmp_path / "a", **settings)


def test_some_bad_rows_may_be_skipped(tmp_path):
    (tmp_path / "a").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n[]\n{"text": "b"}\n{"text": ""}\n')
    train, _, found = split(tmp_path / "a", eval_fraction=0, max_bad_rows=2)
    assert train == ["a", "b"]
    assert found.kinds == {"text"}


def test_what_belongs_together_is_held_out_together(tmp_path):
    path = tmp_path / "a"
    rows = [{"text": text, "book": f"book {i % 97}"} for i, text in enumerate(TEXTS)]
    path.write_text("\n".join(map(json.dumps, rows)))
    train, held, found = split(path, eval_fraction=0.1, group_field="book")
    books = {row["text"]: row["book"] for row in rows}
    assert sorted([*train, *held]) == sorted(TEXTS) and held
    assert {books[text] for text in train}.isdisjoint({books[text] for text in held})
    assert len({books[text] for text in held[:10]}) > 3  # an evaluation that reads few reads of many books
    assert found.sha256 != split(path, eval_fraction=0.1)[2].sha256
    with pytest.raises(UserError, match="line 1 has no field 'bok'; did you mean 'book'?"):
        split(path, eval_fraction=0.1, group_field="bok")
