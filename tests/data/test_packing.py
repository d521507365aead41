import json

import grain
import numpy as np
import pytest

from kdjax.data.packing import empty_row, get_state, pack, set_state, to_batch

LENGTHS = [3, 7, 4, 12, 1, 8, 2, 5, 16, 9, 30, 1, 1, 6]
T = 16


def document(i):
    n = LENGTHS[i % len(LENGTHS)]
    weight = np.ones(n, np.float32)
    weight[: i % 3] = 0
    return {"tokens": np.arange(100 * i + 1, 100 * i + 1 + n, dtype=np.int32), "weight": weight}


def rows_of(documents, packing, **options):
    dataset = grain.MapDataset.source([document(i) for i in documents])
    return list(pack(dataset, packing, {"tokens": T, "weight": T}, **options))


def tokens_of(rows):
    return sorted(token for row in rows for token in row["tokens"][row["tokens_segment_ids"] > 0].tolist())


@pytest.mark.parametrize(
    ("packing", "documents"), [("concat", range(14)), ("first_fit", [i for i in range(70) if LENGTHS[i % 14] <= T])]
)
def test_no_token_is_lost_or_repeated(packing, documents):
    rows = rows_of(documents, packing, shuffle_seed=3)
    assert tokens_of(rows) == sorted(token for i in documents for token in document(i)["tokens"].tolist())
    if packing == "concat":
        assert all((row["tokens_segment_ids"] > 0).all() for row in rows[:-1])


def test_first_fit_never_cuts():
    documents = [i for i in range(70) if LENGTHS[i % 14] <= T]
    pieces = [
        tuple(row["tokens"][row["tokens_segment_ids"] == segment].tolist())
        for row in rows_of(documents, "first_fit")
        for segment in range(1, row["tokens_segment_ids"].max() + 1)
    ]
    assert sorted(pieces) == sorted(tuple(document(i)["tokens"].tolist()) for i in documents)


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_a_state_through_json_resumes_at_every_row(packing):
    documents = [i for i in range(1400) if packing == "concat" or LENGTHS[i % 14] <= T]
    dataset = grain.MapDataset.source([document(i) for i in documents]).shuffle(seed=5).repeat()

    def fresh():
        return iter(pack(dataset, packing, {"tokens": T, "weight": T}, shuffle_seed=1))

    iterator, states, rows = fresh(), [], []
    for _ in range(40):
        state = get_state(iterator)
        assert state == json.loads(json.dumps(state))
        states.append(state)
        rows.append(next(iterator))
    for start in range(34):
        again = fresh()
        set_state(again, states[start])
        for row in rows[start : start + 6]:
            found = next(again)
            assert all(np.array_equal(found[name], row[name]) for name in row)


def row(tokens, segments, weights):
    positions = [segments[:i].count(segment) if segment else 0 for i, segment in enumerate(segments)]
    named = {"tokens": tokens, "tokens_segment_ids": segments, "tokens_positions": positions}
    return {name: np.array(value, np.int32) for name, value in named.items()} | {
        "weight": np.array(weights, np.float32)
    }


def test_rows_targets_and_weights_exactly():
    batch = to_batch(
        [
            row([5, 6, 7, 8, 9, 0], [1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 0]),
            row([5, 6, 7, 8, 0, 0], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]),  # prompt 5 6, answer 7 8
            row([0, 4, 0, 4, 3, 0], [1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1]),  # 0 is a token here, and an end of text
            empty_row(row([1] * 6, [1] * 6, [1] * 6)),
        ]
    )
    assert batch.student_rows_BR.tolist() == [[0, 1, 3, 0, 0, 0], [1, 2, 0, 0, 0, 0], [0, 1, 3, 4, 0, 0], [0] * 6]
    assert batch.targets_BR.tolist() == [[6, 7, 9, 0, 0, 0], [7, 8, 0, 0, 0, 0], [4, 0, 3, 0, 0, 0], [0] * 6]
    assert batch.ce_weight_BR.tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [0] * 6]
    assert batch.kd_weight_BR.tolist() == batch.ce_weight_BR.tolist()
    assert batch.student.position_BT.tolist()[0] == [0, 1, 2, 0, 1, 0]
    assert batch.teacher is None and batch.teacher_rows_BR is None
    for array in (batch.student_rows_BR, batch.targets_BR, batch.student.tokens_BT, batch.student.segment_BT):
        assert array.dtype == np.int32
    assert batch.ce_weight_BR.dtype == np.float32


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_trap_3_a_perfect_next_token_oracle_has_no_cross_entropy(packing):
    documents = [i for i in range(14) if packing == "concat" or LENGTHS[i] <= T]
    batch = to_batch(rows_of(documents, packing))
    # The oracle knows the documents, not the batch: within one, tokens count up by one.
    predicted_BR = np.take_along_axis(batch.student.tokens_BT, batch.student_rows_BR, axis=1) + 1
    logits_BRV = np.where(np.arange(1400) == predicted_BR[..., None], 50.0, 0.0)
    log_p_BRV = logits_BRV - np.log(np.exp(logits_BRV).sum(-1, keepdims=True))
    loss_BR = -np.take_along_axis(log_p_BRV, batch.targets_BR[..., None], axis=-1)[..., 0]
    assert batch.ce_weight_BR.sum() > 20
    assert (loss_BR * batch.ce_weight_BR).sum() < 1e-9


def test_packed_rows_ask_what_the_documents_alone_ask():
    documents = [i for i in range(40) if LENGTHS[i % 14] <= T]

    def questions(batch):
        """(tokens seen, positions seen, target, weight) of each row that counts."""
        view, found = batch.student, []
        for b, r in zip(*np.nonzero(batch.ce_weight_BR), strict=True):
            at = batch.student_rows_BR[b, r]
            seen = (view.segment_BT[b] == view.segment_BT[b, at]) & (np.arange(T) <= at)
            values = view.tokens_BT[b][seen].tolist(), view.position_BT[b][seen].tolist()
            found.append((*values, int(batch.targets_BR[b, r]), float(batch.ce_weight_BR[b, r])))
        return sorted(found)

    alone = [to_batch(rows_of([i], "first_fit")) for i in documents]
    packed = to_batch(rows_of(documents, "first_fit"))
    assert len(packed.targets_BR) < len(documents) / 2
    assert questions(packed) == sorted(question for batch in alone for question in questions(batch))
