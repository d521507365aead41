"""What each task makes of an example: targets where they are predicted, weights, and draws that come again."""

import json
from dataclasses import replace

import numpy as np
import pytest

from kdjax import data
from kdjax.data import DataConfig
from kdjax.data.examples import Example
from kdjax.data.tasks import TASKS, Facts
from kdjax.data.tokenizers import byte_tokenizer
from kdjax.errors import UserError

BYTES = byte_tokenizer()
FACTS = Facts(BYTES, mask_fraction=0.15, start_token=256, labels=3)
TEXT = Example("text", (("text", "The quick brown fox jumps over the lazy dog. " * 200),))
PAIR = Example("answer", (("prompt", "two and two"), ("answer", "four")))


def made(task, example=TEXT, facts=FACTS, seed=0):
    return TASKS[task](example, facts, np.random.default_rng(seed))


def test_masked_tokens_are_chosen_and_hidden_in_the_shares_of_the_paper():
    plain, masked = made("causal_lm"), made("masked_lm")
    tokens, seen, chosen = plain["tokens"], masked["tokens"], masked["weight"] > 0
    np.testing.assert_array_equal(masked["targets"], tokens)
    np.testing.assert_array_equal(seen[~chosen], tokens[~chosen])
    assert abs(chosen.mean() - 0.15) < 0.01 and not chosen[-1], "the end of text is never chosen"
    hidden, kept = (seen == BYTES.mask_id)[chosen].mean(), (seen == tokens)[chosen].mean()
    assert abs(hidden - 0.8) < 0.04 and abs(kept - 0.1) < 0.03
    again, other = made("masked_lm"), made("masked_lm", seed=1)
    np.testing.assert_array_equal(again["tokens"], seen)
    assert (other["tokens"] != seen).any()


def test_a_prompt_is_never_masked():
    masked = made("masked_lm", PAIR, replace(FACTS, mask_fraction=0.999))
    assert masked["weight"][: len("two and two")].sum() == 0 and masked["weight"].sum() == len("four")


def test_a_pair_and_a_text_as_input_and_output():
    pair = made("seq2seq", PAIR)
    assert BYTES.decode(pair["inputs"]) == "two and two" and pair["inputs"][-1] == BYTES.eos_id
    assert BYTES.decode(pair["targets"]) == "four" and pair["targets"][-1] == BYTES.eos_id
    assert pair["tokens"].tolist() == [256, *pair["targets"][:-1]] and (pair["weight"] == 1).all()
    text = made("seq2seq", Example("text", (("text", "abcdefgh"),)))
    assert BYTES.decode(text["inputs"]) + BYTES.decode(text["targets"]) == "abcdefgh"
    long = [made("seq2seq", TEXT, replace(FACTS, inputs=64, targets=20), seed) for seed in range(5)]
    assert {len(each["inputs"]) for each in long} == {64} and {len(each["tokens"]) for each in long} == {20}
    assert len({BYTES.decode(each["inputs"]) for each in long}) > 1, "another place for another draw"
    assert BYTES.encode_prompt("two and two", is_input=True) == pair["inputs"].tolist()
    with pytest.raises(UserError, match="no pair of input and output"):
        made("seq2seq", Example("messages", (("user", "a"), ("assistant", "b"))))


def test_a_class_is_predicted_at_the_first_token():
    found = made("classification", replace(TEXT, label=2))
    assert found["targets"][0] == 2 and found["weight"].sum() == found["weight"][0] == 1
    cut = made("classification", replace(TEXT, label=2), replace(FACTS, inputs=10))["tokens"]
    assert len(cut) == 10 and cut[-1] == BYTES.eos_id
    with pytest.raises(UserError, match="its label is 3; the model tells 3 classes apart"):
        made("classification", replace(TEXT, label=3))
    with pytest.raises(UserError, match="it has no label"):
        made("classification")


def test_a_tokenizer_without_a_mask_is_refused():
    class Without:
        mask_id = None

    with pytest.raises(UserError, match="has no mask token"):
        made("masked_lm", facts=Facts(Without()))


def written(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(sources=(f"jsonl:{path}",), packing="first_fit", sequence_length=32, eval_fraction=0.2)


def test_packed_batches_of_every_task(tmp_path):
    rows = [
        {"text": f"{word} {number}", "label": number % 3} for number, word in enumerate(["up", "down", "left"] * 20)
    ]
    config = replace(written(tmp_path, rows), task="classification", dedupe_ngram=0)
    built = data.build(config, BYTES, batch_size=4, labels=3)
    (batch, state), (second, _) = (next(stream) for stream in [built.train(prefetch=0)] for _ in range(2))
    starts = (batch.student.position_BT == 0) & (batch.student.segment_BT > 0)
    assert starts.sum() == batch.ce_weight_BR.sum() > 4, "one place a text, several texts a row"
    np.testing.assert_array_equal(next(built.train(state, prefetch=0))[0].student.tokens_BT, second.student.tokens_BT)
    for row, column in zip(*np.nonzero(starts), strict=True):
        at = batch.student_rows_BR[row].tolist().index(column) if column else 0
        text = batch.student.tokens_BT[row][batch.student.segment_BT[row] == batch.student.segment_BT[row, column]]
        assert batch.targets_BR[row, at] == int(BYTES.decode(text).split()[1]) % 3


def test_pairs_are_packed_side_by_side(tmp_path):
    rows = [{"prompt": f"say {n}", "answer": str(n) * 3} for n in range(60)]
    config = replace(written(tmp_path, rows), task="seq2seq", target_length=16, dedupe_ngram=0)
    built = data.build(config, BYTES, batch_size=2, start_token=7)
    for batch in [next(built.train(prefetch=0))[0], *built.evaluation(2)]:
        view, encoder = batch.student, batch.student.encoder
        assert view.tokens_BT.shape == (2, 16) and encoder.tokens_BT.shape == (2, 32)
        for row in range(2):
            for segment in range(1, view.segment_BT[row].max() + 1):
                asked = BYTES.decode(encoder.tokens_BT[row][encoder.segment_BT[row] == segment])
                said = view.tokens_BT[row][view.segment_BT[row] == segment]
                assert said[0] == 7 and asked == f"say {BYTES.decode(said[1:])[0 : len(asked) - 4]}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "mlm"}, "data.task is 'mlm'; it must be one of auto, causal_lm"),
        ({"task": "seq2seq", "packing": "concat"}, "would cut the examples of seq2seq; set data.packing to first_fit"),
        ({"task": "masked_lm", "mask_fraction": 0.0}, "data.mask_fraction is 0.0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**settings)


@pytest.mark.parametrize("label", [None, "three", 1.5, -1, True])
def test_labels_are_whole_numbers(tmp_path, label):
    config = replace(written(tmp_path, [{"text": "a b", "label": label}] * 9), task="classification")
    with pytest.raises(UserError, match="wanted the text's class, a whole number from 0"):
        data.build(config, BYTES, batch_size=2, labels=3)
