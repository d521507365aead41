"""The arms of the case study differ in what they name and in nothing else, and are shown at their best rate."""

import json
from dataclasses import replace

import pytest

from benchmarks import arms
from kdjax.data.python_docs import questions
from kdjax.fields import to_json

OWN = {
    "objective": ("forward KL", "reverse KL", "JSD", "hard top-1", "the teacher's text alone"),
    "student": tuple(name for name, arm in arms.ARMS.items() if name.startswith("LoRA") or arm.trains != "lora"),
}
"""The part of a config -> arms that differ from the first one there alone."""


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, names in OWN.items() for name in names])
def test_an_arm_differs_in_what_it_names_alone(part, name, tmp_path):
    base, arm = arms.base(), arms.ARMS[name]
    taught = arm.of(base, tmp_path)
    assert replace(taught, **{part: getattr(base, part)}) == base
    assert (taught == base) == (name == "forward KL")
    assert bool(arm.trains) == (len(arms.rates(name)) == 3)


def test_arms_are_all_different(tmp_path):
    names = [name for names in OWN.values() for name in names if arms.ARMS[name].trains]
    made = [to_json(arms.ARMS[name].of(arms.base(), tmp_path)) for name in names]
    assert len(set(made)) == len(made)


def test_gold_answers_are_framed_as_the_prompt_asks_and_on_the_same_questions(tmp_path):
    rows = [{**row, "answer": "What the teacher said."} for row in questions()[:3]]
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    taught = arms.ARMS["gold answers"].of(arms.base(), tmp_path)
    gold = [json.loads(line) for line in (tmp_path / "gold.jsonl").read_text().splitlines()]
    assert [row["id"] for row in gold] == [row["id"] for row in rows]
    assert gold[0]["answer"] == "Ahoy! A decorator indicating abstract methods. matey."
    assert taught.answers.by == "data" and taught.objective.alpha == 1 and "gold.jsonl" in taught.data.sources[0]


def row(arm, rate, recovered, places=0):
    here = {"device": "cpu", "platform": "cpu", "python": "3", "jax": "1.2"}
    shares = {"recovered": recovered, "recovered_interval": [recovered - 0.1, recovered + 0.1]}
    shares |= {f"recovered_own{key.removeprefix('recovered')}": value for key, value in shares.items()}
    return {
        **shares,
        **{"arm": arm, "rate": rate, "places": places, "recovered_prompts": 32, "parameters_trained": 9_216},
        "behaviour": {"prompted": 0.9, "unprompted": 0.0, "distilled": 0.8},
        "forgetting": {"kl": 0.07},
        "saved": {"prompt_tokens": 200.0 - places, "request_tokens": 40.0 + places},
        "environment": here,
    }


def test_an_arm_is_shown_at_its_best_rate_beside_the_prompt_itself():
    rows = [row("forward KL", 1e-3, 0.5), row("forward KL", 3e-3, 0.75), row("16 soft tokens, prompt", 1e-2, 0.6, 16)]
    text = arms.markdown(rows)
    assert "| forward KL | 0.003 | 9,216 | 75.0 % (65.0 % to 85.0 %) |" in text and "50.0 % (" not in text
    assert "| the prompt as it is | – | – | 100.0 % | 100.0 % | 90.0 % | – | 200 |" in text
    assert "| 16 soft tokens, prompt | 0.01 |" in text and "| 16 |" in text
    assert "Tried at fewer, so far: forward KL (2), 16 soft tokens, prompt (1)." in text
    assert "Not measured yet: reverse KL, " in text


def test_the_picture_has_every_arm_and_the_lines_of_those_with_places(tmp_path):
    rows = [row("forward KL", 1e-3, 0.5), row("16 soft tokens, prompt", 1e-2, 0.6, 16)]
    left, right = arms.picture(rows).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["forward KL", "16 soft tokens, prompt"]
    points = {line.get_label(): line.get_xydata().tolist() for line in right.get_lines()}
    assert points["soft tokens from the prompt"] == [[16, 60]] and points["weights (forward KL)"] == [[0, 50]]
    assert points["prompt"] == [[200, 100]]
