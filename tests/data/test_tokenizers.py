import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors, trainers

from kdjax.data.chat import CHATML
from kdjax.data.tokenizers import byte_tokenizer, check_fits, load_tokenizer
from kdjax.errors import UserError

BYTES = byte_tokenizer()
SPECIAL = re.compile(r"<\|(endoftext|im_start|im_end)\|>|<mask>")


def trained(words, specials=("<|endoftext|>",), bos=None):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(words, trainer)
    if bos:
        pair = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=pair)
    return backend


@given(st.text().filter(lambda text: not SPECIAL.search(text)))
@settings(max_examples=200, deadline=None)
def test_bytes_of_any_text_and_back(text):
    ids = BYTES.encode(text)
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


def test_bytes_specials():
    assert BYTES.encode("a<|im_end|>é") == [97, 258, 0xC3, 0xA9]
    assert (BYTES.eos_id, BYTES.eos_token, BYTES.size) == (256, "<|endoftext|>", 260)
    assert BYTES.decode([97, 256, 98]) == "ab"
    assert BYTES.decode([97, 256, 98], special=True) == "a<|endoftext|>b"
    assert BYTES.eos_ids == (256, 258)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    BYTES.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.sha256 == BYTES.sha256
    assert again.encode("höhe\n") == BYTES.encode("höhe\n")
    assert (again.eos_id, again.chat_template) == (256, CHATML)
    assert load_tokenizer(tmp_path / "tokenizer.json").sha256 == BYTES.sha256


def test_template_and_special_names_are_read_and_kept(tmp_path):
    trained(["abc"], ("<s>", "<end>")).save(str(tmp_path / "tokenizer.json"))
    config = {
        "eos_token": {"content": "<end>"},
        "bos_token": "<s>",
        "chat_template": [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ messages }}"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.bos_token, tokenizer.chat_template) == (1, "<s>", "{{ messages }}")
    tokenizer.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert (again.eos_id, again.bos_token, again.chat_template) == (1, "<s>", "{{ messages }}")
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert load_tokenizer(tmp_path).chat_template == "own file"


def test_end_of_text_from_the_models_config_or_a_known_name(tmp_path):
    trained(["abc"], ("<one>", "</s>")).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).eos_id == 1
    (tmp_path / "config.json").write_text('{"eos_token_id": [0, 1]}')
    assert load_tokenizer(tmp_path).eos_id == 0


def test_truncation_in_the_file_is_not_obeyed(tmp_path):
    backend = trained(["abc"])
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("xyz" * 10)) == 30


def test_prompts_begin_with_bos_and_do_not_end(tmp_path):
    trained(["abc"], ("<s>", "</s>"), bos="<s>").save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    bare = tokenizer.encode("xy")
    assert tokenizer.encode_prompt("xy") == [0, *bare]
    assert bare[0] != 0


def test_fit():
    check_fits(BYTES, 260)
    with pytest.raises(
        UserError, match="does not fit the model: it has ids up to 259 but the model's vocabulary is 258"
    ):
        check_fits(BYTES, 258)


def test_equal_sizes_are_not_equal_tokenizers(tmp_path):
    found = []
    for name, words in (("a", ["aaa aaa bcbc"] * 9), ("b", ["xyxyx zzzz"] * 9)):
        (tmp_path / name).mkdir()
        backend = trained(words)
        backend.save(str(tmp_path / name / "tokenizer.json"))
        found.append(load_tokenizer(tmp_path / name))
    small = min(tokenizer.size for tokenizer in found)
    cut = [{i: t for t, i in tokenizer.backend.get_vocab().items() if i < small} for tokenizer in found]
    assert cut[0] != cut[1]
    assert found[0].sha256 != found[1].sha256
    assert found[0].sha256 == load_tokenizer(tmp_path / "a").sha256


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"model": 1}'])
def test_broken_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer.json is no readable tokenizer.json"):
        load_tokenizer(tmp_path)


def test_missing_file_and_missing_end(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at .*tokenizer.json; give"):
        load_tokenizer(tmp_path)
    trained(["abc"], ("<what>",)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no token that ends a text is known"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json is no readable JSON"):
        load_tokenizer(tmp_path)
