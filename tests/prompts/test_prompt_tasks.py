"""What a prompt shows, and that the template of the winner writes the same prompt for distillation."""

import pytest

from kdjax.data.chat import render
from kdjax.data.examples import Example as Row
from kdjax.data.tokenizers import byte_tokenizer
from kdjax.data.views import Views, encode_views
from kdjax.prompts.tasks import TASKS, Candidate, Example, show, template

SHOTS = (Example("2+2", "4"), Example("{{ 3 }}+{% if %}", "{# 6 #}"))


def test_a_prompt_is_instruction_shots_and_query():
    task = TASKS["question_answering"]
    prompt = show(task, Candidate("Answer.", SHOTS[:1]), "1+1")
    assert prompt == "Answer.\n\nQuestion: 2+2\nAnswer: 4\n\nQuestion: 1+1\nAnswer:"
    assert show(task, Candidate("", SHOTS[:1]), "1+1") == "Question: 2+2\nAnswer: 4\n\nQuestion: 1+1\nAnswer:"


def test_ids_are_of_what_is_said_alone():
    one = Candidate("a", SHOTS, "ape", ("x",))
    assert one.id == Candidate("a", SHOTS).id and one == Candidate("a", SHOTS)
    others = [Candidate("b", SHOTS), Candidate("a"), Candidate("a", SHOTS[::-1])]
    assert len({one.id, *(other.id for other in others)}) == 4


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("text", ["Say {{it}} {%raw%} {{{#", "One.\n\n  Two {", ""])
def test_the_template_writes_what_was_shown(name, text):
    task, candidate, query = TASKS[name], Candidate(text, SHOTS), "a {{ b }} <c> 'd'"
    row = {"text": query + " tail", "turn": "not this"}
    written = template(task, candidate, "{{ text[:-5] }}", chat=False)
    assert render(written, row, strict=True) == show(task, candidate, query)
    said = []
    chat = template(task, candidate, "{{ text[:-5] }}", chat=True)
    render(chat, row | {"chat": lambda messages: said.append(messages) or ""}, strict=True)
    assert said == [[{"role": "user", "content": show(task, candidate, query)}]]


def test_the_template_is_a_view_of_distillation():
    task, candidate, tokenizer = TASKS["summarising"], Candidate("Short, please.", SHOTS), byte_tokenizer()
    row = Row("answer", (("prompt", "p"), ("answer", "this")), columns={"text": "long"})
    view = template(task, candidate, "{{ text }}", chat=True)
    prompt = tokenizer.render([{"role": "user", "content": show(task, candidate, "long")}], add_generation_prompt=True)
    tokens = encode_views(row, tokenizer, Views(student=view))["tokens"].tolist()
    assert tokens == [*tokenizer.encode(prompt), *tokenizer.encode("this<|im_end|>")]
