import dataclasses
import hashlib
import itertools
import json
import logging

import jax
import numpy as np
import pytest

from kdjax.data import DataConfig, build, merge_states, with_template
from kdjax.data.tokenizers import byte_tokenizer
from kdjax.errors import UserError

BYTES = byte_tokenizer()
EOS = 256


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def texts(count, letter="d"):
    return [f"{letter}{i}" + "-abcdefghijklmnopqrstuvwxyz"[: i % 23] for i in range(count)]


@pytest.fixture
def config(tmp_path):
    """300 short documents, nothing held out."""
    source = write(tmp_path / "a", [{"text": text} for text in texts(300)])
    return DataConfig(sources=(source,), sequence_length=32, eval_fraction=0)


def take(iterator, count):
    found = list(itertools.islice(iterator, count))
    iterator.close()
    return found


def arrays(batch):
    return jax.tree.leaves(batch)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(arrays(one), arrays(other), strict=True))


def documents_of(shard, count):
    """Return the first `count` documents of a shard's rows under concat, put together again."""
    tokens: list[int] = []
    for row in shard:
        assert (row["tokens_segment_ids"] > 0).all()
        tokens += row["tokens"].tolist()
        if tokens.count(EOS) >= count:
            break
    parts = bytes(31 if token == EOS else token for token in tokens).split(b"\x1f")
    return [part.decode() for part in parts[:count]]


def test_an_epoch_has_every_document_once_and_the_next_one_in_another_order(config):
    data = build(config, BYTES, batch_size=4)
    shards = data.layout.shards
    assert shards == 64 and data.train_documents == 300
    two_epochs = [documents_of(data.shard(s), 2 * len(range(s, 300, shards))) for s in range(shards)]
    epochs = [
        [text for found in two_epochs for text in found[: len(found) // 2]],
        [text for found in two_epochs for text in found[len(found) // 2 :]],
    ]
    assert [sorted(epoch) for epoch in epochs] == [sorted(texts(300))] * 2
    assert epochs[0] != epochs[1] and epochs[0] != texts(300)


def test_batches_are_the_shards_rows_in_turn(config):
    data = build(config, BYTES, batch_size=4)
    streams = {number: iter(data.shard(number)) for number in range(data.layout.shards)}
    for step, (batch, state) in enumerate(take(data.train(), 20)):
        assert state["step"] == step + 1
        expected = [next(streams[number])["tokens"] for number in data.layout.turn(step)]
        assert np.array_equal(batch.student.tokens_BT, expected)


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_a_state_goes_on_with_the_very_next_batch(config, packing):
    config = dataclasses.replace(config, packing=packing, max_shards=8)
    found = take(build(config, BYTES, batch_size=4).train(prefetch=3), 14)
    for at in (0, 1, 4, 8):
        state = json.loads(json.dumps(found[at][1]))
        again = take(build(config, BYTES, batch_size=4).train(state, prefetch=0), 4)
        for (batch, place), (batch_again, place_again) in zip(found[at + 1 : at + 5], again, strict=True):
            assert same(batch, batch_again)
            assert place == place_again
    assert not same(found[0][0], found[1][0])


@pytest.mark.parametrize(
    ("packing", "batch_size", "max_shards"), [("concat", 4, 64), ("first_fit", 4, 8), ("concat", 16, 8)]
)
def test_the_number_of_processes_may_change(config, packing, batch_size, max_shards):
    config = dataclasses.replace(config, packing=packing, max_shards=max_shards)
    reference = [batch for batch, _ in take(build(config, BYTES, batch_size=batch_size).train(), 12)]
    state, batches = None, []
    for count in (1, 2, 4, 1):
        processes = [
            build(config, BYTES, batch_size=batch_size, process_index=index, process_count=count).train(state)
            for index in range(count)
        ]
        for _ in range(3):
            parts = [next(process) for process in processes]
            batches.append(jax.tree.map(lambda *x: np.concatenate(x), *[batch for batch, _ in parts]))
        for process in processes:
            process.close()
        states = [json.loads(json.dumps(place)) for _, place in parts]
        assert sum(len(place["shards"]) for place in states) == len(merge_states(states)["shards"])
        state = merge_states(states)
    assert all(same(one, other) for one, other in zip(reference, batches, strict=True))


def test_sources_mix_by_weight_and_resume(config, tmp_path):
    other = write(tmp_path / "b", [{"text": text} for text in texts(90, "e")])
    config = dataclasses.replace(config, sources=(*config.sources, other), weights=(1.0, 3.0), max_shards=4)
    data = build(config, BYTES, batch_size=4)
    found = [text[0] for number in range(4) for text in documents_of(data.shard(number), 200)]
    assert found.count("e") == 600 and found.count("d") == 200
    batches = take(data.train(), 6)
    again = take(build(config, BYTES, batch_size=4).train(batches[2][1]), 3)
    assert all(same(one, other) for (one, _), (other, _) in zip(batches[3:], again, strict=True))
    unweighted = build(dataclasses.replace(config, weights=()), BYTES, batch_size=4)
    found = [text for number in range(4) for text in documents_of(unweighted.shard(number), len(range(number, 390, 4)))]
    assert sorted(found) == sorted([*texts(300), *texts(90, "e")])


def test_held_out_batches_and_their_hash(config):
    config = dataclasses.replace(config, eval_fraction=0.1, eval_tokens=32 * 7, dedupe_ngram=0)
    data = build(config, BYTES, batch_size=4)
    assert data.train_documents + data.held_out_documents == 300
    batches = data.evaluation(4)
    assert [batch.student.tokens_BT.shape for batch in batches] == [(4, 32), (4, 32)]
    assert batches[1].student.segment_BT[3].max() == 0 and batches[1].ce_weight_BR[3].sum() == 0
    tokens_BT = np.concatenate([batch.student.tokens_BT for batch in batches])[:7]
    segments_BT = np.concatenate([batch.student.segment_BT for batch in batches])[:7]
    digest = hashlib.sha256()
    for tokens_T, segments_T in zip(tokens_BT, segments_BT, strict=True):
        for part in (tokens_T, segments_T, (segments_T > 0).astype("<f4")):
            digest.update(part.tobytes())
    assert data.held_out_hash == digest.hexdigest() == build(config, BYTES, batch_size=2).held_out_hash
    assert build(dataclasses.replace(config, split_seed=1), BYTES, batch_size=4).held_out_hash != data.held_out_hash
    tokens = tokens_BT[segments_BT > 0].tolist()
    held = bytes(31 if token == EOS else token for token in tokens).decode().split("\x1f")[:-1]  # the last may be cut
    trained = {t for s in range(64) for t in documents_of(data.shard(s), len(range(s, data.train_documents, 64)))}
    assert len(trained) == data.train_documents and len(held) > 10
    assert trained.isdisjoint(held) and set(held) < set(texts(300))
    halves = [build(config, BYTES, batch_size=4, process_index=i, process_count=2).evaluation(4) for i in (0, 1)]
    for whole, first, second in zip(batches, *halves, strict=True):
        assert same(whole, jax.tree.map(lambda a, b: np.concatenate([a, b]), first, second))


def test_nothing_held_out_gives_no_batches(config):
    data = build(config, BYTES, batch_size=4)
    assert (data.evaluation(4), data.held_out_hash) == ([], "")


def test_few_documents_make_few_shards(config, tmp_path):
    source = write(tmp_path / "few", [{"text": text} for text in texts(5)])
    config = dataclasses.replace(config, sources=(source,))
    data = build(config, BYTES, batch_size=8)
    assert data.layout.shards == 4
    seen = {document for number in range(4) for document in documents_of(data.shard(number), 12)}
    assert seen == set(texts(5))
    assert take(data.train(), 3)[-1][0].student.tokens_BT.shape == (8, 32)
    with pytest.raises(UserError, match="at most 1 data shards makes 1, which do not split over 2 processes"):
        config = dataclasses.replace(config, sources=(write(tmp_path / "one", [{"text": "a"}]),))
        build(config, BYTES, batch_size=8, process_count=2)


def answers(config, tmp_path, lengths, **settings):
    rows = [{"prompt": f"{i:04}?", "answer": "y" * length} for i, length in enumerate(lengths)]
    source = write(tmp_path / "answers", rows)
    return dataclasses.replace(config, sources=(source,), packing="first_fit", **settings)


def test_answers_alone_weigh_and_no_example_is_cut(config, tmp_path):
    config = answers(config, tmp_path, [i % 20 + 1 for i in range(200)], max_shards=8)
    for batch, _ in take(build(config, BYTES, batch_size=4).train(), 20):
        view = batch.student
        assert set(batch.targets_BR[batch.ce_weight_BR > 0].tolist()) == {ord("y"), EOS}
        for b in range(4):
            for segment in range(1, view.segment_BT[b].max() + 1):
                tokens = view.tokens_BT[b][view.segment_BT[b] == segment].tolist()
                answer = int(bytes(tokens[:4])) % 20 + 1
                assert tokens[4:] == [ord("?"), *[ord("y")] * answer, EOS]
        assert batch.ce_weight_BR.sum() == ((view.tokens_BT == ord("y")) | (view.tokens_BT == EOS)).sum()


def test_an_overlong_example_is_an_error_with_its_row_and_lengths(config, tmp_path):
    config = answers(config, tmp_path, [5] * 20 + [27] + [5] * 19, max_shards=1)
    batches = build(config, BYTES, batch_size=1).train()
    with pytest.raises(UserError, match="answers line 21: it has 33 tokens, more than data.sequence_length 32"):
        for _ in range(100):
            next(batches)


def test_overlong_examples_may_be_skipped_up_to_a_cap(config, tmp_path, caplog):
    config = answers(config, tmp_path, [5] * 20 + [27] + [5] * 19, max_shards=1, max_bad_rows=1)
    with caplog.at_level(logging.WARNING):
        batches = take(build(config, BYTES, batch_size=1).train(), 100)
    prompts = {bytes(batch.student.tokens_BT[0, :4].tolist()) for batch, _ in batches}
    assert len(prompts) > 30 and b"0020" not in prompts
    assert [record.getMessage().split(": ")[0][-15:] for record in caplog.records] == ["answers line 21"]
    every = answers(config, tmp_path, [27] * 4, max_shards=1, max_bad_rows=100)
    with pytest.raises(UserError, match="it has 33 tokens"):
        next(build(every, BYTES, batch_size=1).train())


def test_messages_go_through_the_template_given(config, tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ '[' + m.role[0] + ']' + m.content + ';' }}{% endfor %}"
        "{{ '[a]' if add_generation_prompt else '' }}"
    )
    source = write(tmp_path / "m", [{"messages": turns}] * 9)
    config = dataclasses.replace(config, sources=(source,), packing="first_fit")
    ((batch, _),) = take(build(config, with_template(BYTES, str(template)), batch_size=1).train(), 1)
    first = batch.student.tokens_BT[0][batch.student.segment_BT[0] == 1]
    assert bytes(first.tolist()) == b"[u]q;[a]a;"
    assert batch.targets_BR[0][batch.ce_weight_BR[0] > 0][:2].tolist() == [*b"a;"]
    with pytest.raises(UserError, match="data.chat_template .* cannot be read"):
        with_template(BYTES, "/nowhere")


def test_prompts_are_not_cut_by_concat(config, tmp_path):
    config = dataclasses.replace(answers(config, tmp_path, [5] * 9), packing="concat")
    with pytest.raises(UserError, match="'concat' would cut a prompt from its answer .*first_fit"):
        build(config, BYTES, batch_size=1)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "seed 0, this run's is 1"),
        ({"sequence_length": 64}, "sequence_length 32"),
        ({"packing": "first_fit"}, "packing concat"),
        ({"max_shards": 8}, "shards 64, this run's is 8"),
    ],
)
def test_a_state_of_other_data_is_refused(config, change, name):
    ((_, state),) = take(build(config, BYTES, batch_size=4).train(), 1)
    with pytest.raises(UserError, match=f"the saved position is of data with {name}"):
        build(dataclasses.replace(config, **change), BYTES, batch_size=4).train(state)


def test_a_state_of_other_text_batch_or_processes_is_refused(config, tmp_path):
    parts = [take(build(config, BYTES, batch_size=4, process_index=i, process_count=2).train(), 2) for i in (0, 1)]
    state = merge_states([part[0][1] for part in parts])
    with pytest.raises(UserError, match="batch_size 4, this run's is 8"):
        build(config, BYTES, batch_size=8).train(state)
    with pytest.raises(UserError, match=r"lacks data shards \[2, 3, 6.*merge the states"):
        build(config, BYTES, batch_size=4).train(parts[0][0][1])
    with pytest.raises(UserError, match="saved positions differ: step 1 and 2"):
        merge_states([parts[0][0][1], parts[1][1][1]])
    write(tmp_path / "a", [{"text": text} for text in texts(300, "x")])
    with pytest.raises(UserError, match="with documents "):
        build(config, BYTES, batch_size=4).train(state)


def test_python_docs_are_ready_in_the_default_config(capfd):
    data = build(DataConfig(), BYTES, batch_size=4)
    assert data.train_documents > 5_000 and data.held_out_documents > data.held_out_dropped > 0
    batches = data.evaluation(4)
    assert sum((batch.student.segment_BT > 0).sum() for batch in batches) == 16_384
    ((batch, _),) = take(data.train(), 1)
    assert batch.ce_weight_BR.sum() > 900
    assert capfd.readouterr() == ("", "")
