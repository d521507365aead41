"""What is said of a prompt's effect: sentences that follow the figures, and a page that nothing gets into."""

import io
import re

import pytest
from rich.console import Console

from kdjax.report.effect import effect_table, sentences, write_effect


def mean(score, low=None, high=None):
    return {"score": score, "low": score if low is None else low, "high": score if high is None else high}


def spread(*scores):
    variants = [{"name": f"way {n}", **mean(score)} for n, score in enumerate(scores)]
    return mean(sum(scores) / len(scores)) | {"lowest": min(scores), "highest": max(scores), "variants": variants}


def reliability(ece, accuracy, confidence):
    curve = [{"from": 0.5, "to": 0.6, "examples": 3, "confidence": confidence, "accuracy": accuracy}]
    return {"ece": ece, "accuracy": accuracy, "confidence": confidence, "curve": curve}


def request(tokens, seconds):
    return {
        "prompt_tokens": tokens, "answer_tokens": 1.0, "prefill": seconds, "decode": 0.01, "seconds": seconds,
        "cache_bytes": 1000 * tokens,
    }  # fmt: skip


@pytest.fixture
def found():
    both = {"calibrated": reliability(0.1, 0.6, 0.7), "plain": reliability(0.2, 0.5, 0.7)}
    prompt = {"id": "1", "text": "<script>x</script>\x1b[2J", "shots": 2, **mean(0.6, 0.5, 0.7)}
    return {
        "task": "classification",
        "measure": "accuracy",
        "scorer": "a-model",
        "calibrated": True,
        "examples": 50,
        "prompts": [prompt | {"gain": mean(0.1, -0.01, 0.2)}],
        "without": mean(0.5),
        "sensitivity": {"format": spread(0.2, 0.6), "order of the worked examples": spread(0.5, 0.52)},
        "varied_shots": 2,
        "shots": {
            "counts": [{"shots": n, "plain": spread(0.4), "calibrated": spread(0.6)} for n in (0, 1, 8)],
            "gain": {"plain": mean(0.31, 0.2, 0.4), "calibrated": mean(0.01, -0.1, 0.1)},
        },
        "calibration": {"prompted": both, "unprompted": both},
        "likelihood": {"prompted": mean(-1), "unprompted": mean(-3), "gain": mean(2, 1, 3)},
        "kl": [{"position": n, "examples": 50, **mean(2.0 - n)} for n in range(2)],
        "cost": {"with_prompt": request(100, 0.5), "without": request(20, 0.25), "saved_seconds": 0.25},
        "environment": {"jax": "0.10.2"},
    }


def test_sentences_follow_the_figures(found):
    found["cost"]["break_even"] = {"distil_seconds": 900.0, "requests": 3600, "never": False}
    assert sentences(found) == [
        "The prompt gains 10 points over none, 0.500 to 0.600 on 50 examples, which may be chance.",
        "Of what should not matter, most hangs on the format: 40 points from the lowest to the highest (order of the "
        "worked examples 2 points), with 2 examples shown.",
        "8 examples gain 31 points over none; 30 points of these are gone once labels are calibrated.",
        "With the prompt the model is too sure of itself: it gives its label 70.0 % on the average and is right in "
        "60.0 %; the calibration error is 10.0 % (10.0 % without the prompt).",
        "The prompt makes the wanted answers 2.000 nats a token likelier; it moves the model by 2.000 nats of KL at an "
        "answer's first token, 1.000 at token 2.",
        "A request carries 80 tokens and 0.08 MB of cache for the prompt, and takes 0.25 s longer here.",
        "Distilling it for 900 s is paid back after 3,600 requests, one at a time.",
    ]


def test_what_is_not_so_is_not_said(found):
    found["cost"] |= {"saved_seconds": -0.1, "break_even": {"distil_seconds": 9.0, "requests": None, "never": True}}
    found["shots"]["gain"] = {"plain": mean(-0.2, -0.3, -0.1), "calibrated": mean(0.02)}
    found["likelihood"]["gain"] = mean(-0.5, -0.7, -0.2)
    said = sentences(found)
    assert "8 examples lose 20 points over none; they gain 2 points once labels are calibrated." in said
    assert "Distilling it for 9 s is never paid back: no seconds are saved." in said
    assert any("0.500 nats a token less likely" in one for one in said) and "takes 0.1 s less here" in said[-2]


def test_what_a_task_without_labels_has_no_figures_of_is_left_out(found):
    del found["calibration"]
    found |= {"sensitivity": {}, "measure": "likelihood", "shots": {"counts": [{"shots": 0, "plain": spread(-1.0)}]}}
    found["shots"]["gain"] = {"plain": mean(0)}
    said = " ".join(sentences(found))
    assert "gains 0.100 nats a token over none" in said and "calibrat" not in said and "examples gain" not in said


def test_the_page_needs_nothing_and_nothing_gets_into_it(found, tmp_path):
    page = write_effect("a & b", found, tmp_path / "report.html").read_text()
    assert page.count("<svg") == 6 and "<script" not in page and "&lt;script&gt;" in page and "\x1b" not in page
    assert not re.search(r"(?:src|href)=\"(?!#)", page) and "a &amp; b" in page
    assert all(f"var(--curve-{hue})" in page for hue in (0, 1)) and "#00001" not in page
    del found["calibration"]
    assert write_effect("a", found, tmp_path / "report.html").read_text().count("<svg") == 5


def test_the_console_shows_the_same(found):
    console = Console(file=io.StringIO(), width=160)
    console.print(effect_table(found))
    text = console.file.getvalue()
    assert "without a prompt" in text and sentences(found)[2] in text and "\\x1b" in text and "\x1b[2J" not in text
