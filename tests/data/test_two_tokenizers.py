"""Two tokenizers of one text: what their tokens spell, where both have a border, and which entries are the same."""

import json

import numpy as np
import pytest
import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from kdjax.data.across import BEGINS, OUTSIDE, WITHIN, borders, encode_across, student_of, token_bytes
from kdjax.data.examples import Example
from kdjax.data.packing import to_batch
from kdjax.data.tokenizers import Tokenizer, byte_tokenizer
from kdjax.data.views import Views
from kdjax.errors import UserError

TEXT = [
    "the cat sat on the mat and the dog sat on the log",
    "naïve café – ünïcödé, 漢字 and 😀 too",
    "def f(x):\n    return x",
]


def byte_level(size, ends=("<|endoftext|>",)):
    """A byte-level BPE, as GPT-2's."""
    backend = hf.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(ends), initial_alphabet=alphabet)
    backend.train_from_iterator(TEXT * 20, trainer)
    return Tokenizer(backend, eos_id=backend.token_to_id(ends[0]))


def sentencepiece(prepends):
    """A BPE with SentencePiece's space and byte fallback, as Llama 2's."""
    backend = hf.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if prepends:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(TEXT[:1] * 20, trainers.BpeTrainer(vocab_size=60, special_tokens=special))
    told = json.loads(backend.to_str())
    vocab = told["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    return Tokenizer(hf.Tokenizer.from_str(json.dumps(told)), eos_id=2)


KINDS = {
    "bytes": byte_tokenizer,
    "byte-level": lambda: byte_level(320),
    "other byte-level": lambda: byte_level(290),
    "sentencepiece": lambda: sentencepiece(False),
    "sentencepiece with a space in front": lambda: sentencepiece(True),
}


@pytest.fixture(scope="module")
def kinds():
    return {name: make() for name, make in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_tokens_spell_their_text(kinds, name):
    tokenizer = kinds[name]
    of_token = token_bytes(tokenizer)
    for text in TEXT:
        spelled = b"".join(of_token[number] for number in tokenizer.encode(text)).decode()
        assert spelled == (" " * ("front" in name) + text)
    assert of_token[tokenizer.eos_id] == b""


@pytest.mark.parametrize("teacher", KINDS)
@pytest.mark.parametrize("student", ["bytes", "byte-level", "sentencepiece"])
def test_between_two_borders_both_say_the_same(kinds, student, teacher):
    ours, theirs = kinds[student], kinds[teacher]
    for text in TEXT:
        ids = [[*one.encode(text), one.eos_id] for one in (ours, theirs)]
        flags = borders(*ids, token_bytes(ours), token_bytes(theirs))
        chunks = []
        for tokenizer, numbers, flags_T in zip((ours, theirs), ids, flags, strict=True):
            of_token, starts = token_bytes(tokenizer), [*np.flatnonzero(flags_T == BEGINS), len(numbers)]
            chunks.append(
                [b"".join(of_token[n] for n in numbers[a:b]) for a, b in zip(starts, starts[1:], strict=False)]
            )
        assert [x.lstrip(b" ") for x in chunks[0]] == [x.lstrip(b" ") for x in chunks[1]]
        assert b"".join(chunks[0]).decode().strip() == text and flags[0][0] == flags[1][0] == BEGINS
        assert flags[0][-1] == flags[1][-1] == BEGINS, "the ends of text are a pair"
    assert len(chunks[0]) >= len(ids[1]) - 1 if student == "bytes" else len(chunks[0]) > 2


def test_borders_by_hand():
    """abc|d against ab|cd: one border in common at the beginning, and that of the end."""
    ours, theirs = [b"abc", b"d", b""], [b"ab", b"cd", b""]
    first, second = borders([0, 1, 2], [0, 1, 2], ours, theirs)
    assert first.tolist() == [BEGINS, WITHIN, BEGINS] and second.tolist() == [BEGINS, WITHIN, BEGINS]
    with pytest.raises(UserError, match="spells 'abcd' but the teacher's 'abcx'"):
        borders([0, 1], [0, 1], [b"abc", b"d"], [b"ab", b"cx"])


@pytest.mark.parametrize("teacher", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("student", ["bytes", "other byte-level"])
def test_each_entry_of_the_teacher_counts_as_the_longest_that_it_begins_with(kinds, student, teacher):
    ours, theirs = kinds[student], kinds[teacher]
    found_U, spelled, wanted = student_of(ours, theirs, theirs.size + 3), token_bytes(ours), token_bytes(theirs)
    for number, text in enumerate(wanted):
        if not text:
            assert found_U[number] == ours.eos_id
            continue
        own = spelled[found_U[number]]
        assert own and text.startswith(own)
        assert not any(text.startswith(other) and len(other) > len(own) for other in spelled)
    same = [number for number, text in enumerate(wanted) if text and text in spelled]
    assert all(spelled[found_U[number]] == wanted[number] for number in same) and len(same) > 100
    assert (found_U[theirs.size :] == ours.eos_id).all() and found_U[theirs.eos_id] == ours.eos_id
    if student == "bytes":
        assert all(found_U[number] == text[0] for number, text in enumerate(wanted) if text)


def test_an_example_is_two_rows_of_chunks(kinds):
    ours, theirs = kinds["bytes"], kinds["byte-level"]
    example = Example("answer", (("prompt", "the cat"), ("answer", " sat on the mat")))
    found = encode_across(example, ours, theirs, Views("Q: {{ prompt }}:"), (64, 64))
    assert ours.decode(found["tokens"]) == theirs.decode(found["teacher_tokens"]) == "Q: the cat: sat on the mat"
    assert ours.decode(found["tokens"][found["weight"] != 0]) == " sat on the mat"
    assert (found["chunk"] == BEGINS).sum() == (found["teacher_chunk"] == BEGINS).sum() > 4
    assert ((found["chunk"] == OUTSIDE) == (found["weight"] == 0)).all()
    with pytest.raises(UserError, match="it is a conversation"):
        encode_across(Example("messages", (("user", "a"), ("assistant", "b"))), ours, theirs, None, (64, 64))


def test_a_text_that_is_too_long_ends_at_a_border(kinds):
    ours, theirs = kinds["bytes"], kinds["byte-level"]
    example = Example("text", (("text", TEXT[0]),))
    whole, cut, other = (encode_across(example, ours, theirs, None, room) for room in ((99, 99), (20, 99), (99, 5)))
    assert ours.decode(whole["tokens"]) == TEXT[0] and whole["tokens"][-1] == ours.eos_id
    assert len(cut["tokens"]) <= 20 and ours.decode(cut["tokens"]) == theirs.decode(cut["teacher_tokens"])
    assert len(other["teacher_tokens"]) <= 5 and ours.decode(other["tokens"]) == theirs.decode(other["teacher_tokens"])
    assert TEXT[0].startswith(ours.decode(cut["tokens"])) and len(cut["tokens"]) > 10
    first = np.flatnonzero(whole["chunk"] == BEGINS)[0]
    assert first > 0 and (whole["chunk"][:first] == OUTSIDE).all(), "nothing predicts the first token"


def packed(kinds, texts, length=96, teacher_length=64):
    """Rows with several examples each, as packing makes them."""
    ours, theirs = kinds["bytes"], kinds["byte-level"]
    lengths = {"": length, "teacher_": teacher_length}
    row = {}
    for prefix, size in lengths.items():
        names = ("tokens", "weight", "chunk")
        found = [encode_across(Example("answer", text), ours, theirs, None, (99, 99)) for text in texts]
        for name in names:
            joined = np.concatenate([one[f"{prefix}{name}"] for one in found])
            row[f"{prefix}{name}"] = np.pad(joined, (0, size - len(joined)))
        counts = [len(one[f"{prefix}tokens"]) for one in found]
        segment = np.repeat(np.arange(1, len(found) + 1), counts)
        row[f"{prefix}tokens_segment_ids"] = np.pad(segment, (0, size - len(segment)))
        row[f"{prefix}tokens_positions"] = np.pad(
            np.concatenate([np.arange(n) for n in counts]), (0, size - sum(counts))
        )
    return row


def test_a_batch_pairs_rows_that_predict_after_the_same_text(kinds):
    ours, theirs = kinds["bytes"], kinds["byte-level"]
    answers = [("the cat", " sat on the mat"), ("a dog", "sat and"), ("x", " ünï")]
    texts = [(("prompt", a), ("answer", b)) for a, b in answers]
    batch = to_batch([packed(kinds, texts[:2]), packed(kinds, texts[2:])])
    for b, r in zip(*np.nonzero(batch.kd_weight_BR), strict=True):
        at, other = batch.student_rows_BR[b, r], batch.teacher_rows_BR[b, r]
        segment = batch.student.segment_BT[b, at]
        assert batch.teacher.segment_BT[b, other] == segment
        before = [
            tokenizer.decode(view.tokens_BT[b, : place + 1][view.segment_BT[b, : place + 1] == segment])
            for tokenizer, view, place in ((ours, batch.student, at), (theirs, batch.teacher, other))
        ]
        assert before[0] == before[1]
    assert batch.kd_weight_BR.sum() < batch.ce_weight_BR.sum() == sum(len(b.encode()) + 1 for _, b in answers)
    spans = batch.spans
    for b in range(2):
        for number in range(1, spans.chunk_BR[b].max() + 1):
            ids = (
                batch.targets_BR[b][spans.chunk_BR[b] == number],
                spans.teacher_targets_BO[b][spans.teacher_chunk_BO[b] == number],
            )
            said = [b"".join(token_bytes(one)[n] for n in some) for one, some in zip((ours, theirs), ids, strict=True)]
            assert len(ids[1]) and said[0] == said[1]
        assert spans.chunk_BR[b].max() == batch.kd_weight_BR[b].sum() == spans.teacher_chunk_BO[b].max()
    broken = packed(kinds, texts[:2])
    broken["teacher_chunk"] = np.where(broken["teacher_chunk"] == BEGINS, WITHIN, broken["teacher_chunk"])
    with pytest.raises(UserError, match="other chunks in the teacher's tokens"):
        to_batch([broken])


def test_a_tokenizer_of_another_kind_is_refused():
    backend = hf.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match="neither byte-level nor SentencePiece's"):
        token_bytes(Tokenizer(backend, eos_id=0))
