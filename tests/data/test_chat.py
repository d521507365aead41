import dataclasses

import pytest

from kdjax.data.chat import CHATML, pieces
from kdjax.data.tokenizers import byte_tokenizer
from kdjax.errors import UserError

TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": " yo\n"},
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": "!"},
]


def rendering(template):
    return dataclasses.replace(byte_tokenizer(), chat_template=template).render


def test_assistant_turns_with_their_end_and_nothing_else():
    assert pieces(TURNS, rendering(CHATML)) == [
        ("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", 0.0),
        (" yo\n<|im_end|>", 1.0),
        ("\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n", 0.0),
        ("!<|im_end|>", 1.0),
        ("\n", 0.0),
    ]


def test_pieces_join_to_the_whole():
    render = rendering(CHATML)
    assert "".join(text for text, _ in pieces(TURNS, render)) == render(TURNS)


def test_a_template_may_add_a_system_turn_and_special_tokens():
    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.first and m.role != 'system' %}[sys]{% endif %}"
        "[{{ m['role'] }}] {{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer = dataclasses.replace(byte_tokenizer(), chat_template=template, bos_token="<B>")
    assert pieces(TURNS[1:3], tokenizer.render) == [
        ("<B>[sys][user] hi<|endoftext|>[assistant] ", 0.0),
        ("yo<|endoftext|>", 1.0),
    ]


def test_generation_tags_are_read():
    template = CHATML.replace("{{ message.content }}", "{% generation %}{{ message.content }}{% endgeneration %}")
    assert pieces(TURNS, rendering(template)) == pieces(TURNS, rendering(CHATML))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content if loop.last else '-' }}|{% endfor %}",  # rewrites earlier turns
        CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),  # a prompt that the answer lacks
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
    ],
)
def test_turns_that_cannot_be_told_apart_are_refused(template):
    with pytest.raises(UserError, match="cannot be told apart.*data.chat_template"):
        pieces(TURNS, rendering(template))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", "Expected"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 'a' * 900000000 }}", "more than 4,000,000"),
        ("{{ 900000000 * 'a' }}", "more than 4,000,000"),
        ("{{ '%900000000d' % 1 }}", "formats text"),
        ("{{ 9 ** 9 ** 9 }}", "powers"),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "more than 4,000,000",
        ),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "more than 4,000,000"),
        ("{{ 1 // 0 }}", "zero"),
        ("x" * 100_001, "at most 100,000"),
    ],
)
def test_strangers_templates_fail_cleanly(template, reason):
    with pytest.raises(UserError, match=f"the chat template fails: .*{reason}"):
        rendering(template)(TURNS)
