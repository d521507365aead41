"""A trimmed tokenizer: any text still goes in and out, and what needs no token that is gone is encoded as before."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from kdjax.data.tokenizers import load_tokenizer
from kdjax.data.vocabulary import trim_tokenizer, trimmed
from kdjax.errors import UserError

TEXT = "the cat sat on the mat; the other cat, that other one, sat there. Thirteen hats other than these! " * 3
SPECIALS = ["<s>", "</s>"]


def trained(size=330):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.add_special_tokens(["<pad>"])
    ids = [(name, backend.token_to_id(name)) for name in SPECIALS]
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)]
    )
    return backend


FULL = trained()
TREE = json.loads(FULL.to_str())
COUNTS = Counter(FULL.encode("the other cat sat there", add_special_tokens=False).ids)
SMALLER, OLD_IDS = trimmed(TREE, COUNTS, 275)
SMALL = Backend.from_str(json.dumps(SMALLER))


def ids(backend, text):
    return backend.encode(text, add_special_tokens=False).ids


def test_it_has_so_many_tokens_numbered_anew_in_their_old_order():
    assert FULL.get_vocab_size() > SMALL.get_vocab_size() == len(OLD_IDS) == 275
    assert OLD_IDS == sorted(OLD_IDS)
    assert all(SMALL.id_to_token(new) == FULL.id_to_token(old) for new, old in enumerate(OLD_IDS))


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_goes_in_and_out(text):
    assert SMALL.decode(ids(SMALL, text), skip_special_tokens=False) == text


@given(st.lists(st.sampled_from(TEXT.split()), max_size=8), st.text(max_size=5))
@settings(max_examples=300, deadline=None)
def test_what_needs_kept_tokens_alone_is_encoded_to_the_same_ones(words, more):
    text = " ".join(words) + more
    wanted = ids(FULL, text)
    if set(wanted) <= set(OLD_IDS):
        assert [OLD_IDS[new] for new in ids(SMALL, text)] == wanted


def test_counted_text_is_encoded_to_the_same_tokens():
    text = "the other cat sat there"
    assert [OLD_IDS[new] for new in ids(SMALL, text)] == ids(FULL, text)
    assert ids(SMALL, "Thirteen") != [] and len(ids(SMALL, "Thirteen")) > len(ids(FULL, "Thirteen"))


def test_every_token_can_be_reached():
    for token, new in SMALLER["model"]["vocab"].items():
        if token not in (*SPECIALS, "<pad>"):
            text = decoders.ByteLevel().decode([token])
            if "�" not in text:  # part of a character has no text of its own
                assert ids(SMALL, text) == [new], token


def test_special_tokens_stay_around_a_text():
    assert SMALL.encode("the").tokens == FULL.encode("the").tokens == ["<s>", *FULL.encode("the").tokens[1:-1], "</s>"]
    assert SMALL.encode("the").ids[-1] == SMALL.token_to_id("</s>")
    assert ids(SMALL, "<pad>") == [SMALL.token_to_id("<pad>")]


def test_old_files_write_merges_as_text():
    merges = [" ".join(pair) for pair in TREE["model"]["merges"]]
    assert trimmed(TREE | {"model": TREE["model"] | {"merges": merges}}, COUNTS, 275) == (SMALLER, OLD_IDS)


def test_all_that_knows_ids_is_written_beside_it(tmp_path):
    source, out = tmp_path / "full", tmp_path / "small"
    source.mkdir(), out.mkdir()
    FULL.save(str(source / "tokenizer.json"))
    pad, end = (FULL.token_to_id(name) for name in ("<pad>", "</s>"))
    settings_ = {"eos_token": "</s>", "added_tokens_decoder": {str(pad): {"content": "<pad>"}}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings_))
    generation = {"eos_token_id": [end, pad], "pad_token_id": pad, "top_k": 5}
    (source / "generation_config.json").write_text(json.dumps(generation))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    old_ids = trim_tokenizer(source / "tokenizer.json", COUNTS, 275, out)
    small = load_tokenizer(out)
    new_pad, new_end = old_ids.index(pad), old_ids.index(end)
    assert (small.eos_id, small.size, small.chat_template) == (new_end, 275, "{{ messages }}")
    read = {name: json.loads((out / f"{name}.json").read_text()) for name in ("generation_config", "tokenizer_config")}
    assert read["generation_config"] == {
        "eos_token_id": [new_end, new_pad],
        "pad_token_id": new_pad,
        "top_k": 5,
    }
    assert read["tokenizer_config"]["added_tokens_decoder"] == {str(new_pad): {"content": "<pad>"}}


def test_too_few_tokens_and_other_kinds_are_refused():
    with pytest.raises(UserError, match="vocab is 200; wanted at least 259"):
        trimmed(TREE, COUNTS, 200)
    with pytest.raises(UserError, match="this one is Unigram"):
        trimmed({"model": {"type": "Unigram", "vocab": []}}, COUNTS, 275)
