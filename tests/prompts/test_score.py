"""What a prompt is worth: by labels, calibrated; by likelihood; by written answers."""

import numpy as np
import pytest
from tiny_speaker import speaker

from kdjax.errors import UserError
from kdjax.prompts.score import CONTENT_FREE, Scoring, evaluate, priors
from kdjax.prompts.speaker import How, Said, Weighed
from kdjax.prompts.tasks import LIKELIHOOD, TASKS, Candidate, Example, show

TASK = TASKS["classification"]
LABELS = ("up", "down", "sideways")
PLAIN = Candidate("Which way?")
EXAMPLES = [Example("climb", "up"), Example("fall", "down"), Example("drift", "sideways")]


class Stub:
    """Says and weighs what tables have."""

    name = "stub"

    def __init__(self, log_probs=None, texts=None):
        self.log_probs, self.texts, self.prompts = log_probs, texts, []

    def say(self, prompts, how):
        self.prompts += prompts
        return [Said(self.texts[prompt], 7) for prompt in prompts]

    def weigh(self, pairs):
        return [Weighed(self.log_probs(prompt, answer), len(prompt), len(answer)) for prompt, answer in pairs]


def table(prompt, answer):
    """Log-probabilities that favour `up` whatever is asked, by as much as 2; and know something."""
    bias = {"up": 2.0, "down": 0.5, "sideways": -1.0}[answer]
    knows = {"climb": "up", "fall": "down", "drift": "sideways"}
    known = next((label for word, label in knows.items() if f"Text: {word}\n" in prompt), "")
    return bias - 5.0 + (1.0 if known == answer else 0.0) + (0.3 if "[MASK]" in prompt and answer == "down" else 0.0)


def test_calibration_takes_off_what_labels_get_without_content():
    """p̄ is the mean over the three inputs of softmax(bias), of [MASK] softmax(bias + (0, .3, 0))."""
    stub, bare = Stub(table), Scoring(TASK, "probability", LABELS, calibrated=False)
    scoring = Scoring(TASK, "probability", LABELS)

    def softmax(*x):
        return np.exp(x) / np.exp(x).sum()

    mean = (2 * softmax(2, 0.5, -1) + softmax(2, 0.8, -1)) / 3
    (prior,) = priors(stub, scoring, [PLAIN])
    np.testing.assert_allclose(np.exp(prior.log_probs), mean, rtol=1e-9)
    assert prior.tokens == sum(len(show(TASK, PLAIN, text)) + sum(map(len, LABELS)) for text in CONTENT_FREE)
    pairs = [(PLAIN, example) for example in EXAMPLES]
    raw = evaluate(stub, bare, pairs, {})
    assert [e.said for e in raw] == ["up", "up", "up"]
    assert raw[1].score == pytest.approx(softmax(2, 1.5, -1)[1])
    mended = evaluate(stub, scoring, pairs, {PLAIN.id: prior})
    assert [e.said for e in mended] == list(LABELS)
    likely = np.exp([2, 1.5, -1]) / mean
    assert mended[1].score == pytest.approx((likely / likely.sum())[1])
    accuracy = evaluate(stub, Scoring(TASK, "", LABELS), pairs, {PLAIN.id: prior})
    assert [e.score for e in accuracy] == [1.0, 1.0, 1.0] and [e.score for e in evaluate(
        stub, Scoring(TASK, "accuracy", LABELS, calibrated=False), pairs, {})] == [1.0, 0.0, 0.0]  # fmt: skip


def test_likelihood_is_the_mean_over_the_answers_tokens():
    stub = Stub(lambda prompt, answer: -3.0 * len(answer))
    found = evaluate(stub, Scoring(TASKS["summarising"], LIKELIHOOD), [(PLAIN, EXAMPLES[0])], {})
    assert found[0].score == -3.0


def test_written_answers_are_measured():
    task = TASKS["summarising"]
    prompts = [show(task, PLAIN, example.input) for example in EXAMPLES[:2]]
    stub = Stub(texts=dict(zip(prompts, [" up and away ", ""], strict=True)))
    found = evaluate(stub, Scoring(task), [(PLAIN, example) for example in EXAMPLES[:2]], {})
    assert [(e.score, e.said, e.tokens) for e in found] == [(0.5, "up and away", 7), (0.0, "", 7)]


def test_a_real_model_says_the_same_alone_and_among_others():
    tiny, prompts = speaker(1, chat=False, batch_size=3), ["hello", "zzz", "hello there", "h"]
    together = tiny.say(prompts, How(6))
    assert together == [tiny.say([prompt], How(6))[0] for prompt in prompts]
    assert len({said.text for said in together}) > 2
    text = together[1].text
    stopped = tiny.say(prompts, How(6, stop=(text[2],)))[1]
    assert stopped.text == text[: text.index(text[2])] and stopped.tokens <= together[1].tokens


def test_bad_measures_and_labels_are_refused():
    with pytest.raises(UserError, match="unknown measure 'rouge' of this task; did you mean 'rouge_l'"):
        Scoring(TASKS["summarising"], "rouge")
    with pytest.raises(UserError, match="at least two"):
        Scoring(TASK, labels=("up", "up"))
    with pytest.raises(UserError, match="'upp' is none of the labels; did you mean 'up'"):
        Scoring(TASK, labels=LABELS).check([Example("x", "upp")])
