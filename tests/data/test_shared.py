"""What all of the teacher's views begin with: found by tokens, left out of rows, and nothing else is changed by it."""

import os.path

import numpy as np
import pytest
import tokenizers as hf
from test_views import BYTES, CHAT, config_of, example, rows_of, text

from kdjax import data
from kdjax.data.shared import LEAST, shared_beginning
from kdjax.data.tokenizers import Tokenizer
from kdjax.data.views import Views, Written, encode_views
from kdjax.errors import UserError

RULES = "Use few words, all of them short ones: "
VIEW = f"{RULES}{{{{ prompt }}}}? "


def shared(texts, tokenizer=BYTES, spoken=None):
    return shared_beginning([Written(text, spoken) for text in texts], tokenizer)


def test_it_is_what_all_begin_with_and_a_token_of_each_is_left():
    assert text(shared([RULES + "one", RULES + "two", RULES + "three"])) == RULES
    assert text(shared([RULES + "one", RULES + "other", RULES])) == RULES[:-1]
    assert text(shared([RULES])) == RULES[:-1]
    assert shared([]) == shared(["", RULES]) == shared([RULES, "other"]) == ()
    assert len(shared(["x" * (LEAST + 1)])) == LEAST and shared(["x" * LEAST]) == ()


def merging(texts, size=300):
    """A tokenizer that was trained on some texts, whose tokens run over spaces and over borders."""
    backend = hf.Tokenizer(hf.models.BPE())
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, eos_id=0)


@pytest.mark.parametrize("seed", range(12))
def test_tokens_that_run_over_the_border_are_not_shared(seed):
    rng = np.random.default_rng(seed)
    draw = lambda count: "".join(rng.choice(list("ab "), count))  # noqa: E731
    head = draw(200)
    texts = [head + draw(int(rng.integers(0, 9))) for _ in range(40)]
    tokenizer = merging([draw(4000), *texts])
    ids = [Written(text).tokens(tokenizer) for text in texts]
    wanted = os.path.commonprefix(ids)[: min(map(len, ids)) - 1]
    assert LEAST <= len(wanted) and shared(texts, tokenizer) == tuple(wanted)
    assert len({tuple(tokens[: len(tokenizer.encode(head))]) for tokens in ids}) > 1  # some do run over it


def built(tmp_path, rows, **changes):
    return data.build(config_of(tmp_path, rows, **{"teacher_view": VIEW} | changes), BYTES, batch_size=4)


def test_rows_hold_what_remains_and_nothing_else_is_other(tmp_path):
    on, off = (built(tmp_path, rows_of(60), teacher_length=800, share_prefix=share) for share in (True, False))
    assert text(on.shared) == RULES and off.shared == ()
    one, other = (next(found.train(prefetch=0))[0] for found in (on, off))
    assert one.teacher is not None and other.teacher is not None
    for name in ("student_rows_BR", "targets_BR", "kd_weight_BR"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    count = 0
    for b in range(4):
        for segment in range(1, one.teacher.segment_BT[b].max() + 1):
            rest, whole = (x.tokens_BT[b][x.segment_BT[b] == segment] for x in (one.teacher, other.teacher))
            assert text(whole) == RULES + text(rest)
            count += 1
        at = np.flatnonzero(one.kd_weight_BR[b])
        for view, rows_BR in ((one.teacher, one.teacher_rows_BR), (other.teacher, other.teacher_rows_BR)):
            assert rows_BR is not None
            np.testing.assert_array_equal(view.tokens_BT[b][rows_BR[b][at] + 1], one.targets_BR[b][at])
    assert count > 8 and on.held_out_hash == off.held_out_hash == ""


def test_trap_17_what_remains_of_a_prompt_is_never_cut(tmp_path):
    rows = rows_of(20)
    rows[7]["prompt"] += "x" * 60
    stream = built(tmp_path, rows, teacher_length=64, student_view="{{ prompt[:20] }}? ").train(prefetch=0)
    with pytest.raises(UserError, match=r"rows.jsonl line 8: it has \d+ tokens, more than data.teacher_length 64"):
        for _ in range(20):
            next(stream)


def test_a_row_that_begins_otherwise_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("kdjax.data.shared._MOST", 1)  # one row alone is looked at
    rows = [{"prompt": f"{n}", "answer": "a"} for n in range(20)]
    rows[13]["prompt"] = "other"
    tokenizer = merging([f"{RULES}other"] * 9)
    found = data.build(
        config_of(tmp_path, rows, teacher_view=f"{'x' * 40}{RULES}{{{{ prompt }}}}"), tokenizer, batch_size=4
    )
    assert tokenizer.decode(found.shared) == "x" * 40 + RULES
    with pytest.raises(UserError, match="line 14: its teacher's view does not begin .*data.share_prefix to False"):
        stream = found.train(prefetch=0)
        for _ in range(20):
            next(stream)


def test_a_view_must_begin_with_what_is_shared_and_go_on():
    views = Views("{{ prompt }}", VIEW)
    got = encode_views(example(), BYTES, views, BYTES.encode(RULES))
    assert text(got["teacher_tokens"]) == "2 + 2? four<|endoftext|>" and text(got["tokens"]) == "2 + 2four<|endoftext|>"
    for other in ("Use many", f"{RULES}2 + 2? "):
        with pytest.raises(UserError, match=f"does not begin with the {len(other)} tokens that other rows' begin with"):
            encode_views(example(), BYTES, views, BYTES.encode(other))


def test_a_conversation_shares_its_system_prompt(tmp_path):
    rows = [row | {"rules": RULES} for row in rows_of(20)]
    found = built(tmp_path, rows, teacher_view=CHAT, student_view='{{ chat([{"role": "user", "content": prompt}]) }}')
    said = text(found.shared)
    assert said.startswith(f"<|im_start|>system\n{RULES}<|im_end|>\n<|im_start|>user\n")


def test_views_that_share_nothing_or_are_none_are_as_they_were(tmp_path):
    assert built(tmp_path, rows_of(20), teacher_view="{{ rules }}: {{ prompt }}? ").shared == ()
    assert built(tmp_path, rows_of(20), teacher_view="").shared == ()
    rows: list[dict] = [*rows_of(20)]
    rows[3] = {"prompt": "no answer", "answer": None, "text": "x"}
    assert text(built(tmp_path, rows, max_bad_rows=1).shared) == RULES  # a bad row is for the encoder to refuse


def test_a_place_in_other_rows_is_refused(tmp_path):
    one, rows = built(tmp_path, rows_of(30)), rows_of(30)
    state = next(iter(one.train(prefetch=0)))[1]
    assert next(built(tmp_path, rows).train(state, prefetch=0))[1]["step"] == 2
    for other in (
        built(tmp_path, rows, share_prefix=False),
        built(tmp_path, [row | {"rules": RULES * 2} for row in rows], teacher_view="{{ rules }}{{ prompt }}? "),
    ):
        with pytest.raises(UserError, match="of data with (views|shared)"):
            next(other.train(state, prefetch=0))
    column = "{{ rules }}{{ prompt }}? "
    first = built(tmp_path, [row | {"rules": RULES} for row in rows], teacher_view=column)
    state = next(iter(first.train(prefetch=0)))[1]
    second = built(tmp_path, [row | {"rules": RULES * 2} for row in rows], teacher_view=column)
    with pytest.raises(UserError, match="of data with shared"):
        next(second.train(state, prefetch=0))
