import dataclasses

import numpy as np
import pytest

from kdjax.data.config import DataConfig
from kdjax.data.examples import Example, encode_example, to_example
from kdjax.data.tokenizers import byte_tokenizer
from kdjax.errors import UserError

BYTES = byte_tokenizer()
CONFIG = DataConfig()
EOS, START, END = 256, 257, 258


def encoded(record, config=CONFIG, tokenizer=BYTES):
    found = encode_example(to_example(record, config, "row 1"), tokenizer)
    assert found["tokens"].dtype == np.int32 and found["weight"].dtype == np.float32
    return found["tokens"].tolist(), found["weight"].tolist()


def test_text_ends_with_eos_and_weighs_everywhere():
    assert encoded({"text": "hi"}) == ([104, 105, EOS], [1, 1, 1])


def test_an_end_that_the_text_brings_is_not_doubled():
    assert encoded({"text": "hi<|endoftext|>"}) == ([104, 105, EOS], [1, 1, 1])


def test_prompt_weighs_nothing_answer_and_its_end_do():
    assert encoded({"prompt": "ab", "answer": "c"}) == ([97, 98, 99, EOS], [0, 0, 1, 1])


def test_the_border_of_prompt_and_answer_does_not_move_with_the_text():
    tokens, weight = encoded({"prompt": "a ", "answer": " b"})
    assert (tokens, weight) == ([97, 32, 32, 98, EOS], [0, 0, 1, 1, 1])


def test_eos_keeps_its_weight_where_it_is_also_padding():
    pad_is_eos = dataclasses.replace(BYTES, eos_id=0)
    assert encoded({"text": "a\0b"}, tokenizer=pad_is_eos) == ([97, 0, 98, 0], [1, 1, 1, 1])


def test_messages_token_by_token():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]
    tokens, weight = encoded({"messages": turns})
    user, assistant = [*b"user\n"], [*b"assistant\n"]
    expected = [
        ([START, *user, *b"q", END, 10, START, *assistant], 0),
        ([*b"a", END], 1),
        ([10, START, *user, *b"r", END, 10], 0),
    ]
    assert tokens == [token for ids, _ in expected for token in ids]
    assert weight == [value for ids, value in expected for _ in ids]


def test_columns_are_chosen_by_name_and_kind():
    everything = {
        "text": "t",
        "prompt": "p",
        "answer": "a",
        "messages": [{"role": "assistant", "content": "m"}],
        "id": 3,
    }
    assert to_example(everything, CONFIG, "").kind == "messages"
    assert to_example(everything | {"messages": None}, CONFIG, "").parts == (("prompt", "p"), ("answer", "a"))
    assert to_example(everything, DataConfig(messages_field="", prompt_field=""), "").parts == (("text", "t"),)
    renamed = DataConfig(text_field="body")
    assert to_example({"body": "b", "text": "t"}, renamed, "").document == "b"


def test_what_tfds_gives_is_read():
    inside_out = {"role": np.array([b"user", b"assistant"], object), "content": [b"h\xc3\xa9", b"yo"]}
    assert to_example({"messages": inside_out}, CONFIG, "") == Example(
        "messages", (("user", "hé"), ("assistant", "yo"))
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"txt": "a"}, "row 1 has no field 'text'.*did you mean 'txt'"),
        ({"body": "a", "id": 1}, "has no field.*known: body, id.*data.text_field"),
        ({}, "known: none"),
        ({"text": 3}, "row 1, field 'text' is a int, wanted text"),
        ({"text": b"a\xff"}, "field 'text' is not UTF-8.*at 1"),
        ({"text": "a\ud800"}, "field 'text' is not UTF-8"),
        ({"prompt": "a", "answer": " "}, "field 'answer' is empty"),
        ({"messages": "hi"}, "field 'messages' is a str, wanted a list"),
        ({"messages": [{"role": "user"}]}, "message 1 needs 'role' and 'content'"),
        ({"messages": [{"role": "assistant", "content": None}]}, "message 1, content is a NoneType"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no turn of role 'assistant'"),
    ],
)
def test_rows_that_teach_nothing_are_named(record, message):
    with pytest.raises(UserError, match=message):
        to_example(record, CONFIG, "row 1")
