"""Three parts that share no input, the same whatever the order of rows, and stable as rows come."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdjax.errors import UserError
from kdjax.prompts.splits import read_examples, split
from kdjax.prompts.tasks import Example

EXAMPLES = [Example(f"input {n}", f"answer {n % 3}") for n in range(400)]


def parts(splits):
    return [{example.input for example in part} for part in (splits.propose, splits.select, splits.test)]


@given(st.integers(0, 50), st.permutations(range(40)))
def test_parts_share_nothing_whatever_the_order(seed, order):
    some = EXAMPLES[:200]
    splits = split(some, (20, 40, 60), seed)
    propose, select, test = parts(splits)
    assert not propose & select and not propose & test and not select & test
    assert split([some[n] for n in order] + some[40:], (20, 40, 60), seed) == splits


def test_sizes_are_kept_and_rows_that_come_move_no_other():
    splits = split(EXAMPLES, (20, 40, 60), 0)
    assert [len(part) for part in (splits.propose, splits.select, splits.test)] == [20, 40, 60]
    assert splits != split(EXAMPLES, (20, 40, 60), 1)
    wide = parts(split(EXAMPLES, (200, 400, 600), 0))
    fewer = parts(split(EXAMPLES[:100], (200, 400, 600), 0))
    assert all(some <= more for some, more in zip(fewer, wide, strict=True))
    assert sum(map(len, wide)) == 400


def test_the_same_input_is_one_example():
    doubled = [*EXAMPLES[:100], *(Example(f"  {e.input.upper()}\n", "other") for e in EXAMPLES[:100])]
    assert split(doubled, (20, 30, 50), 3) == split(EXAMPLES[:100], (20, 30, 50), 3)


def test_balanced_parts_have_as_many_of_each_answer_in_turn_and_none_moves():
    """90 % are of one answer; a place in a part is still by the hash alone, so no example changes its part."""
    skewed = [replace(one, answer=("rare", "common")[n % 10 > 0]) for n, one in enumerate(EXAMPLES)]
    plain, even = (split(skewed, (50, 101, 150), 5, balanced=balanced) for balanced in (False, True))
    wholes = parts(split(skewed, (500, 1010, 1500), 5))
    for part, whole, size in zip(vars(even).values(), wholes, (50, 101, 150), strict=True):
        assert {one.input for one in part} <= whole
        assert len(part) == min(size - size % 2, 2 * sum(one.answer == "rare" for one in skewed if one.input in whole))
        assert [one.answer for one in part] == ["common", "rare"] * (len(part) // 2)
    assert sum(one.answer == "common" for one in plain.test) > 0.8 * len(plain.test)


def test_too_few_rows_are_refused():
    with pytest.raises(UserError, match="4 different examples make parts of .*; wanted 2 each: give more rows"):
        split(EXAMPLES[:4], (20, 40, 60), 0)


def test_rows_become_examples_by_templates(tmp_path):
    rows = [{"text": "one\n\nbody", "kind": 1}, {"text": "no body", "kind": 0}, {"text": "two\n\n b ", "kind": 0}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = [f"jsonl:{file}"]
    body = '{{ text.partition("\n\n")[2] }}'
    assert read_examples(source, body, '{{ ["a", "b"][kind] }}') == [Example("body", "b"), Example("b", "a")]
    with pytest.raises(UserError, match=r"line 1: the template of the input .*'txt' is undefined .columns: text, kind"):
        read_examples(source, "{{ txt }}", "x")
    with pytest.raises(UserError, match="no row .* has both an input and an answer"):
        read_examples(source, "{{ text }}", "")
