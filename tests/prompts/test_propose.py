"""Where candidates come from: each way makes what its paper says, from the examples and models that it may use."""

from random import Random

import pytest

from kdjax.errors import UserError
from kdjax.prompts.propose import METHODS, Workshop, cleaned, phrases, propose
from kdjax.prompts.speaker import Said
from kdjax.prompts.tasks import TASKS, Candidate, Example

EXAMPLES = [Example(f"in{n}", f"out{n}") for n in range(6)]
PARENT = Candidate("Write the summary, then stop.", tuple(EXAMPLES[:1]))


class Writer:
    """Writes what a function makes of the prompt; remembers what it was asked."""

    name = "writer"

    def __init__(self, write=lambda prompt, number: f"Text {number}."):
        self.write, self.prompts = write, []

    def say(self, prompts, how):
        self.prompts += prompts
        return [Said(self.write(prompt, number), 1) for number, prompt in enumerate(prompts)]


def workshop(**more):
    known = {"failures": lambda candidate: [(EXAMPLES[2], "wrong2")], "proposer": Writer(), "critic": Writer()}
    return Workshop(TASKS["summarising"], EXAMPLES, **{**known, "shots": 3, **more})


def test_ape_shows_examples_and_reads_the_instruction():
    shop = workshop(proposer=Writer(lambda prompt, number: f' "summarise it {number}"\n\nMore talk'))
    found = METHODS["ape"](shop, [], 3, Random(0))
    assert [c.text for c in found] == ["Summarise it 0", "Summarise it 1", "Summarise it 2"]
    assert all(c.shots == () and c.parents == () for c in found)
    assert all(prompt.count("Input: in") == 4 and prompt.endswith("was to") for prompt in shop.proposer.prompts)
    assert len(set(shop.proposer.prompts)) == 3


def test_paraphrases_keep_examples_and_name_their_parent():
    shop = workshop()
    found = METHODS["paraphrase"](shop, [PARENT, Candidate("", PARENT.shots)], 3, Random(0))
    assert [(c.text, c.shots, c.parents) for c in found] == [
        (f"Text {n}.", PARENT.shots, (PARENT.id,)) for n in range(2)
    ]
    assert all(PARENT.text in prompt for prompt in shop.proposer.prompts)


def test_a_critic_sees_failures_and_the_proposer_its_reason():
    shop = workshop(critic=Writer(lambda *_: "too vague"), proposer=Writer(lambda *_: "The better prompt is: be exact"))
    (child,) = METHODS["critique"](shop, [PARENT], 1, Random(0))
    assert (child.text, child.shots, child.parents) == ("Be exact", PARENT.shots, (PARENT.id,))
    (asked,), (mended,) = shop.critic.prompts, shop.proposer.prompts
    assert all(word in asked for word in (PARENT.text, "in2", "out2", "wrong2"))
    assert asked.endswith("wrong.") and "too vague" in mended and PARENT.text in mended
    assert METHODS["critique"](workshop(failures=lambda candidate: []), [PARENT], 3, Random(0)) == []


def test_phrases_are_the_text():
    assert phrases("Write the summary, then stop.") == ["Write the summary,", "then stop."]
    assert phrases("Say in one line what it is for") == ["Say", "in one line", "what it is", "for"]
    assert phrases("") == []


def test_edits_without_a_model_leave_out_or_swap_phrases():
    found = {c.text for c in METHODS["grips"](workshop(proposer=None), [PARENT], 40, Random(0))}
    assert found == {"Write the summary,", "then stop.", "then stop. Write the summary,"}
    assert METHODS["grips"](workshop(proposer=None), [Candidate("One")], 3, Random(0)) == []


def test_edits_with_a_model_say_a_phrase_otherwise():
    shop = workshop(proposer=Writer(lambda prompt, number: "Halt"))
    found = {c.text for c in METHODS["grips"](shop, [PARENT], 40, Random(0))}
    assert {"Write the summary, Halt", "Halt then stop."} < found and len(found) == 5
    assert all("Write the summary, then stop." not in prompt for prompt in shop.proposer.prompts)


def test_examples_are_drawn_with_number_and_order():
    found = METHODS["shots"](workshop(), [PARENT], 60, Random(0))
    assert {len(c.shots) for c in found} == {1, 2, 3} and {c.text for c in found} == {PARENT.text}
    assert all(len(set(c.shots)) == len(c.shots) for c in found)
    orders = {tuple(shot.input for shot in c.shots) for c in found if len(c.shots) == 2}
    assert any(order[::-1] in orders for order in orders)


def test_proposals_are_new_named_and_repeat_with_their_seed():
    shop = workshop(proposer=None)
    found = propose(shop, ("grips", "shots"), [PARENT], 8, "0 1")
    assert len({c.id for c in found} | {PARENT.id}) == len(found) + 1
    assert {c.method for c in found} == {"grips", "shots"}
    assert found == propose(shop, ("grips", "shots"), [PARENT], 8, "0 1")
    assert found != propose(shop, ("grips", "shots"), [PARENT], 8, "1 1")


@pytest.mark.parametrize("method", ["ape", "paraphrase", "critique"])
def test_methods_that_write_want_a_model(method):
    with pytest.raises(UserError, match=f"the method {method} needs a model that writes; set proposer.source"):
        METHODS[method](workshop(proposer=None), [PARENT], 1, Random(0))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('"Do it."', "Do it."),
        ("The instruction was to write it.\n\nThen", "Write it."),
        ("Output: do\nit", "Do it"),
        ("**New prompt:** do it", "Do it"),
        ("\n\n  \n", ""),
        ("Prompt the user", "Prompt the user"),
    ],
)
def test_what_a_model_wrote_becomes_an_instruction(text, wanted):
    assert cleaned(text) == wanted
