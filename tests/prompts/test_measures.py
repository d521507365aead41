"""Measures against values worked out by hand, from the words and not from the code."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdjax.prompts.measures import distinct, exact_match, rouge_l, token_f1


@pytest.mark.parametrize(
    ("said", "wanted", "value"),
    [
        ("police killed the gunman", "police kill the gunman", 3 / 4),  # common: police the gunman
        ("the gunman kill police", "police kill the gunman", 2 / 4),  # in order: the gunman
        ("Return the names.", "return all the NAMES, sorted", 2 * 3 / (3 + 5)),
        ("a_b", "A b", 1.0),
        ("a a a a", "a b", 2 * 1 / (4 + 2)),
        ("x", "y", 0.0),
        ("", "y", 0.0),
        ("", "", 0.0),
    ],
)
def test_rouge_l(said, wanted, value):
    assert rouge_l(said, wanted) == pytest.approx(value)


@pytest.mark.parametrize(
    ("said", "wanted", "f1", "exact"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0, 1.0),
        ("in the Eiffel tower of Paris", "Eiffel Tower", 2 * 2 / (5 + 2), 0.0),
        ("a an the", "", 1.0, 1.0),
        ("tower", "", 0.0, 0.0),
        ("to be or not to be", "to be", 2 * 2 / (6 + 2), 0.0),
        ("well-known", "well known", 0.0, 0.0),  # a hyphen goes and leaves no space
        ("theatre", "atre", 0.0, 0.0),  # an article is a word
    ],
)
def test_question_answering_as_squad_normalises(said, wanted, f1, exact):
    assert token_f1(said, wanted) == pytest.approx(f1)
    assert exact_match(said, wanted) == exact


def test_distinct_counts_runs_over_all_texts():
    texts = ["a b a b", "a b c"]  # words: 7, of 3 kinds; pairs: ab ba ab | ab bc, of 3 kinds
    assert distinct(texts, 1) == pytest.approx(3 / 7)
    assert distinct(texts, 2) == pytest.approx(3 / 5)
    assert distinct(["a"], 2) == distinct([], 1) == 0.0


def lcs(a, b):
    """The length by the textbook's table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
def test_rouge_l_is_that_of_the_textbooks_table(said, wanted):
    common = lcs(said, wanted)
    precision, recall = common / max(len(said), 1), common / max(len(wanted), 1)
    value = 2 * precision * recall / (precision + recall) if common else 0.0
    assert rouge_l(" ".join(said), " ".join(wanted)) == pytest.approx(value)
