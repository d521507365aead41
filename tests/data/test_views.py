"""Two views of one example: the answer is the same tokens in both, each border counts once, and nothing is cut."""

import json
from dataclasses import replace

import numpy as np
import pytest

from kdjax import data
from kdjax.data import DataConfig
from kdjax.data.examples import to_example
from kdjax.data.tokenizers import byte_tokenizer
from kdjax.data.views import Views, encode_views, load_views
from kdjax.errors import UserError

BYTES = byte_tokenizer()
TEACHER = "{{ rules }} {% for shot in shots %}{{ shot }}! {% endfor %}{{ prompt }} = "
CHAT = '{{ chat([{"role": "system", "content": rules}, {"role": "user", "content": prompt}]) }}'
BARE = '{{ chat([{"role": "user", "content": prompt}]) }}'
ROW = {"prompt": "2 + 2", "answer": "four", "rules": "Use words.", "shots": ["1 + 1 = two", "1 + 2 = three"]}


def example(row=ROW):
    return to_example(row, DataConfig(), "row 1")


def text(ids):
    return BYTES.decode(ids, special=True)


def test_templates_see_the_columns_and_the_answer_stands_behind_them():
    got = encode_views(example(), BYTES, Views("{{ prompt }} = ", TEACHER))
    assert text(got["tokens"]) == "2 + 2 = four<|endoftext|>"
    assert text(got["teacher_tokens"]) == "Use words. 1 + 1 = two! 1 + 2 = three! 2 + 2 = four<|endoftext|>"
    for prefix in ("", "teacher_"):
        weighed = got[f"{prefix}tokens"][got[f"{prefix}weight"] == 1]
        assert text(weighed) == "four<|endoftext|>"


def test_chat_ends_where_the_assistant_speaks_and_the_answer_is_a_turn():
    got = encode_views(example(), BYTES, Views(BARE, CHAT))
    assert text(got["tokens"]) == "<|im_start|>user\n2 + 2<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>"
    assert text(got["teacher_tokens"]).startswith("<|im_start|>system\nUse words.<|im_end|>\n<|im_start|>user\n2 + 2")
    for prefix in ("", "teacher_"):
        assert text(got[f"{prefix}tokens"][got[f"{prefix}weight"] == 1]) == "four<|im_end|>"


def test_without_a_teachers_view_there_is_one():
    got = encode_views(example(), BYTES, Views("Q: {{ prompt }} A: "))
    assert got.keys() == {"tokens", "weight"} and text(got["tokens"]) == "Q: 2 + 2 A: four<|endoftext|>"
    own = encode_views(example(), BYTES, Views("", "{{ rules }}{{ prompt }}"))
    assert text(own["tokens"]) == "2 + 2four<|endoftext|>"


@pytest.mark.parametrize(
    ("views", "said"),
    [
        (Views("", "{{ rulez }}"), "the teacher's view fails: 'rulez' is undefined; mend data.teacher_view"),
        (Views("{% if %}"), "the student's view fails: .*; mend data.student_view"),
        (Views("", "{{ answer }}"), "'answer' is undefined"),
        (Views("", "{{ 'x' * 9999999 }}"), "builds more than"),
        (Views("", "{{ prompt.__class__.__mro__ }}"), "the teacher's view fails"),
        (Views("{% if 0 %}x{% endif %}"), "the student's view is empty, so nothing predicts"),
        (Views("", CHAT), "its answer is other tokens in the teacher's view .* use chat\\(\\) in both views"),
    ],
)
def test_what_cannot_be_a_view_is_refused_in_one_line(views, said):
    with pytest.raises(UserError, match=said) as caught:
        encode_views(example(), BYTES, views)
    assert "\n" not in str(caught.value)


def test_text_has_no_views():
    with pytest.raises(UserError, match="it is text, but views are of a prompt with its answer"):
        encode_views(to_example({"text": "abc"}, DataConfig(), ""), BYTES, Views("x"))


def test_views_are_read_from_files(tmp_path):
    path = tmp_path / "view.jinja"
    path.write_text("{{ rules }}")
    config = DataConfig(packing="first_fit", teacher_view=f"@{path}")
    assert load_views(config) == Views("", "{{ rules }}")
    assert load_views(DataConfig()) is None
    with pytest.raises(UserError, match="data.student_view .*none.jinja cannot be read"):
        load_views(replace(config, student_view=f"@{tmp_path / 'none.jinja'}"))


@pytest.mark.parametrize("changes", [{"packing": "concat"}, {"task": "masked_lm"}])
def test_views_want_whole_examples_of_a_decoder(changes):
    with pytest.raises(UserError, match="views are of prompts with answers, for causal_lm in rows of first_fit"):
        DataConfig(**{"packing": "first_fit", "teacher_view": "x"} | changes)


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return f"jsonl:{path}"


def rows_of(count, seed=0):
    rng = np.random.default_rng(seed)
    words = lambda n: " ".join("abcdefgh"[i] * int(rng.integers(1, 5)) for i in rng.integers(0, 8, n))  # noqa: E731
    return [
        {"prompt": f"{n} {words(3)}", "answer": words(int(rng.integers(1, 7))), "rules": words(int(rng.integers(1, 9)))}
        for n in range(count)
    ]


def config_of(tmp_path, rows, **changes):
    own = {"sequence_length": 96, "teacher_length": 160, "student_view": "{{ prompt }}? ", "teacher_view": TEACHER_OF}
    own |= {"eval_fraction": 0.0, "packing": "first_fit", "sources": (write(tmp_path / "rows.jsonl", rows),)}
    return DataConfig(**own | changes)


TEACHER_OF = "{{ rules }}: {{ prompt }}? "


def test_packed_rows_compare_the_same_token_of_both_views(tmp_path):
    config = config_of(tmp_path, rows_of(60))
    batch = next(data.build(config, BYTES, batch_size=4).train(prefetch=0))[0]
    assert batch.student.tokens_BT.shape == (4, 96) and batch.teacher.tokens_BT.shape == (4, 160)
    several = 0
    for b in range(4):
        weighed = np.flatnonzero(batch.kd_weight_BR[b])
        rows, others = batch.student_rows_BR[b][weighed], batch.teacher_rows_BR[b][weighed]
        targets = batch.targets_BR[b][weighed]
        np.testing.assert_array_equal(batch.student.tokens_BT[b][rows + 1], targets)
        np.testing.assert_array_equal(batch.teacher.tokens_BT[b][others + 1], targets)
        np.testing.assert_array_equal(batch.student.segment_BT[b][rows], batch.teacher.segment_BT[b][others])
        for segment in np.unique(batch.student.segment_BT[b][rows]):
            student, teacher = (
                text(view.tokens_BT[b][view.segment_BT[b] == segment]) for view in (batch.student, batch.teacher)
            )
            prompt, _, answer = student.partition("? ")
            assert teacher.endswith(f": {student}") and answer.endswith("<|endoftext|>")
            mine = targets[batch.student.segment_BT[b][rows] == segment]
            assert text(mine) == answer and prompt
            several += 1
    assert several > 6


def test_trap_17_a_teachers_view_that_is_too_long_is_an_error_and_never_cut(tmp_path):
    rows = rows_of(20)
    rows[7]["rules"] = "x" * 400
    config = config_of(tmp_path, rows)
    stream = data.build(config, BYTES, batch_size=4).train(prefetch=0)
    with pytest.raises(UserError, match=r"rows.jsonl line 8: it has \d+ tokens, more than data.teacher_length 160"):
        for _ in range(20):
            next(stream)
    lenient = data.build(replace(config, max_bad_rows=1), BYTES, batch_size=4)
    assert next(lenient.train(prefetch=0))[0].teacher is not None


def test_other_views_are_other_data(tmp_path):
    config = config_of(tmp_path, rows_of(30))
    one = data.build(config, BYTES, batch_size=2)
    other = data.build(replace(config, teacher_view="{{ prompt }}? "), BYTES, batch_size=2)
    state = next(iter(one.train(prefetch=0)))[1]
    with pytest.raises(UserError, match="of data with views"):
        next(other.train(state, prefetch=0))
