"""The analysis of a prompt's effect: what was planted is found, nothing is paid for twice, bad input is one line."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny_search

from kdjax import effect as job
from kdjax.cli import main
from kdjax.effect import effect, read_candidates
from kdjax.errors import UserError
from kdjax.prompts.bench import KEY
from kdjax.prompts.config import EffectConfig, PromptsConfig, SpeakerConfig
from kdjax.prompts.effect import Study, by_shots, counts, formats, orders, sensitivity, words
from kdjax.prompts.effect_ledger import Ledger, Variant
from kdjax.prompts.journal import Journal
from kdjax.prompts.score import CONTENT_FREE, Scoring
from kdjax.prompts.speaker import Weighed
from kdjax.prompts.splits import Splits
from kdjax.prompts.tasks import TASKS, Candidate, Example, show, template

POOL = [Example(f"shot {n}", "up" if n % 2 else "down") for n in range(12)]
TEST = [Example(f"number {n}", "up" if n % 2 else "down") for n in range(20)]
PROMPTS = PromptsConfig(task="classification", labels=("up", "down"), scorer=SpeakerConfig("planted"))
CONFIG = EffectConfig(prompts=PROMPTS)
SCORING = Scoring(TASKS["classification"], labels=("up", "down"))


class Planted:
    """Knows the answer unless a planted thing stands in the prompt: it then takes the answer that is asked first."""

    name = "planted"

    def __init__(self, breaks=lambda prompt: False, leans=0.0):
        self.breaks, self.leans, self.weighed = breaks, leans, []

    def weigh(self, pairs):
        self.weighed += pairs
        return [Weighed(self._log_prob(*pair), len(pair[0]), 1) for pair in pairs]

    def _log_prob(self, prompt, label):
        lean = self.leans * (label.lower() == "up")
        asked = prompt.rstrip(": -").split("number ")[-1].split()[0] if "number " in prompt else ""
        if not asked or self.breaks(prompt):
            return -1.0 + lean
        right = "up" if int(asked) % 2 else "down"
        return lean - 1.0 - 2.0 * (label.lower() != right)


def ledger(speaker, tmp_path, scoring=SCORING):
    return Ledger(speaker, scoring, TEST, Journal(tmp_path / "evaluations.jsonl", KEY))


def study(shots=3, config=CONFIG):
    return Study(config, SCORING, Candidate("Say it.", tuple(POOL[:shots])), POOL)


def test_a_planted_effect_of_order_is_found(tmp_path):
    """All is right but for the orders in which a planted example stands last."""
    speaker = Planted(lambda prompt: "shot 2\nLabel: down\n\nText: number" in prompt)
    found = sensitivity(ledger(speaker, tmp_path), study(config=replace(CONFIG, orders=6)))
    order = found["order of the worked examples"]
    assert (order["lowest"], order["highest"]) == (0.5, 1.0) and len(order["variants"]) == 6
    assert sum(one["score"] == 0.5 for one in order["variants"]) == 2 and order["score"] == pytest.approx(5 / 6)
    assert found["words of the labels"]["lowest"] == 0.5  # the same order in other words, as it was given
    assert found["choice of the worked examples"]["highest"] == 1.0


def test_a_planted_effect_of_format_and_of_words_is_found(tmp_path):
    speaker = Planted(lambda prompt: "Q: " in prompt or "UP" in prompt)
    found = sensitivity(ledger(speaker, tmp_path), study(2))
    assert {one["name"]: one["score"] for one in found["format"]["variants"]} == {
        "as given": 1, "Input, Output": 1, "Q, A": 0.5, "a dash for the colon": 1, "answers on the same line": 1,
        "no blank lines": 1,
    }  # fmt: skip
    said = {one["name"]: one["score"] for one in found["words of the labels"]["variants"]}
    assert said == {"as given": 1, "upper case": 0.5, "capitalised": 1}
    assert {label for prompt, label in speaker.weighed if "Label: UP" in prompt} == {"UP", "DOWN"}
    assert found["order of the worked examples"]["lowest"] == 1


def test_formats_write_what_they_say():
    shown = {one.part: show(one.scoring.task, one.candidate, "q") for one in formats(study(1))}
    assert shown == {
        "Input, Output": "Say it.\n\nInput: shot 0\nOutput: down\n\nInput: q\nOutput:",
        "Q, A": "Say it.\n\nQ: shot 0\nA: down\n\nQ: q\nA:",
        "a dash for the colon": "Say it.\n\nText - shot 0\nLabel - down\n\nText - q\nLabel -",
        "answers on the same line": "Say it.\n\nText: shot 0 Label: down\n\nText: q Label:",
        "no blank lines": "Say it.\nText: shot 0\nLabel: down\nText: q\nLabel:",
    }


def test_other_words_stand_for_the_labels_and_those_that_fall_together_are_left_out():
    found = words(study(config=replace(CONFIG, label_sets=("high, low",))))
    assert [one.scoring.labels for one in found] == [("up", "down"), ("UP", "DOWN"), ("Up", "Down"), ("high", "low")]
    alike = replace(study(), scoring=replace(SCORING, labels=("up", "Up")))
    assert [one.scoring.labels for one in words(alike)] == [("up", "Up")]


def test_orders_are_different_ones_of_the_same_examples():
    for shots, wanted in ((1, 1), (2, 2), (3, 4), (6, 4)):
        found = [one.candidate.shots for one in orders(study(shots))]
        assert len(set(found)) == len(found) == wanted and all(set(one) == set(POOL[:shots]) for one in found)


def test_what_worked_examples_add_and_calibration_takes(tmp_path):
    """It leans to one label without examples, so that half is wrong; calibrated, nothing is left to gain."""
    speaker = Planted()
    speaker._log_prob = lambda prompt, label, of=speaker._log_prob: (
        of(prompt, label) + 5.0 * (label == "up") * (prompt.count("Label: ") < 3)
    )
    found = by_shots(ledger(speaker, tmp_path), study(), 4)
    assert [row["shots"] for row in found["counts"]] == counts(4) == [0, 1, 2, 4]
    assert [row["plain"]["score"] for row in found["counts"]] == [0.5, 0.5, 0.5, 1]
    assert [row["calibrated"]["score"] for row in found["counts"]] == [1] * 4
    assert found["gain"]["plain"]["score"] == 0.5 and found["gain"]["plain"]["low"] > 0.2
    assert found["gain"]["calibrated"]["score"] == 0
    assert len(found["counts"][3]["plain"]["variants"]) == CONFIG.draws
    assert counts(0) == [0] and counts(9) == [0, 1, 2, 4, 8]


def test_an_evaluation_serves_all_measures_and_is_paid_once(tmp_path):
    speaker, variant = Planted(leans=1.0), Variant("", Candidate("Say it."), SCORING)
    first = ledger(speaker, tmp_path)
    scores = first.scores(variant), first.scores(variant, False), first.probs(variant)
    assert len(speaker.weighed) == 2 * (len(TEST) + len(CONTENT_FREE)) and first.paid == len(TEST)
    again = ledger(speaker, tmp_path)
    known = again.scores(variant), again.scores(variant, False), again.probs(variant)
    for one, other in zip(scores, known, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(speaker.weighed) == 2 * (len(TEST) + len(CONTENT_FREE)) and again.paid == 0
    up = math.exp(2) / (math.exp(2) + 1)  # once the lean is taken off
    np.testing.assert_allclose(scores[2][1], [up, 1 - up], rtol=1e-4)


def test_a_number_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="unfit"):
        ledger(Planted(leans=math.nan), tmp_path).scores(Variant("", Candidate("Say it."), SCORING))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bins": 0}, "bins is 0; wanted at least 1"),
        ({"label_sets": ("high",)}, "wanted 2 different words"),
        ({"label_sets": ("high, high",)}, "wanted 2 different words"),
        ({"distil_seconds": 1.0, "distil_run": "runs/x"}, "both set"),
        ({"prompts": replace(PROMPTS, scorer=SpeakerConfig("http://localhost:1/v1", model="m"))}, "is a server"),
        ({"prompts": replace(PROMPTS, make="magpie", proposer=SpeakerConfig("m"))}, "wants 'search'"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, says):
    with pytest.raises(UserError, match=says):
        replace(CONFIG, **change)


SPLITS = Splits(tuple(POOL), (), tuple(TEST))


def test_the_prompts_of_a_search_are_read_and_its_winner_as_well(tmp_path):
    rows = [
        {"text": "a", "shots": [], "is_best": False, "scores": [{"mean": 0.9}]},
        {"text": "b {{", "shots": [vars(POOL[0])], "is_best": True, "scores": [{"mean": 0.1}, {"mean": 0.5}]},
        {"text": "c", "shots": [], "is_best": False, "scores": [{"mean": 0.1}, {"mean": 0.4}]},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(CONFIG, candidates=str(tmp_path / "prompts.jsonl"), most_prompts=2)
    found = read_candidates(config, SPLITS)
    assert found == [Candidate("b {{", (Example("shot 0", "down"),)), Candidate("c")]
    for chat in (True, False):
        (tmp_path / "best.txt").write_text(template(SCORING.task, found[0], PROMPTS.input, chat))
        (one,) = read_candidates(replace(CONFIG, candidates=str(tmp_path / "best.txt")), SPLITS)
        assert show(SCORING.task, one, "q") == show(SCORING.task, found[0], "q")
    with pytest.raises(UserError, match="shows the example 'shot 0', which is measured on"):
        read_candidates(config, replace(SPLITS, test=tuple(POOL)))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("none.jsonl", None, "cannot be read"),
        ("none.txt", None, "cannot be read"),
        ("bad.jsonl", '{"text": 1}\n', "no prompts.jsonl of a search"),
        ("bad.txt", "Say it.", "does not end with"),
        ("empty.jsonl", "\n", "there is no prompt"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path, name, text, says):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        read_candidates(replace(CONFIG, candidates=str(tmp_path / name)), SPLITS)


def test_the_seconds_of_a_distillation_come_from_its_run(tmp_path):
    assert job.distil_seconds(CONFIG) is None and job.distil_seconds(replace(CONFIG, distil_seconds=5.0)) == 5
    config = replace(CONFIG, distil_run=str(tmp_path))
    with pytest.raises(UserError, match="no seconds of a finished run"):
        job.distil_seconds(config)
    (tmp_path / "summary.json").write_text('{"seconds": 12.5}')
    assert job.distil_seconds(config) == 12.5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    prompts = tiny_search.write(tmp_path_factory.mktemp("effect"), rows=60)
    own = replace(prompts, instructions=(tiny_search.PLANTED, "Go."), test_rows=20, select_rows=2, shots=2)
    return EffectConfig(prompts=own, orders=2, draws=1, most_shots=2, distil_seconds=1e6)


@pytest.mark.slow
def test_a_killed_analysis_goes_on_and_pays_nothing_twice(tiny, tmp_path, monkeypatch, capsys):
    whole = effect(tiny, tmp_path / "whole")
    assert whole["prompts"][0]["score"] == 1 > whole["without"]["score"]
    assert whole["prompts"][0]["gain"]["score"] == pytest.approx(1 - whole["without"]["score"])
    calibrated, plain = (whole["calibration"]["prompted"][way] for way in ("calibrated", "plain"))
    assert plain["accuracy"] == 1 and 0 <= plain["ece"] <= 1 and calibrated["curve"]
    assert [one["position"] for one in whole["kl"]] == [0, 1] and whole["kl"][0]["score"] > 0
    cost = whole["cost"]
    assert cost["with_prompt"]["prompt_tokens"] - cost["without"]["prompt_tokens"] == pytest.approx(
        len(tiny_search.PLANTED) + 2
    )
    assert cost["break_even"]["distil_seconds"] == 1e6
    assert cost["break_even"]["never"] == (cost["saved_seconds"] <= 0)
    for stage in ("sensitivity", "by_shots", "_cost"):
        with monkeypatch.context() as patched:
            patched.setattr(job, stage, lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                effect(tiny, tmp_path / "killed")
    found = effect(tiny, tmp_path / "killed")
    lines = [(tmp_path / run / "evaluations.jsonl").read_text().splitlines() for run in ("whole", "killed")]
    rows = [[row for row in map(json.loads, some) if row["part"] != "cost"] for some in lines]
    assert rows[0] == rows[1] and len({tuple(row[name] for name in KEY) for row in rows[1]}) == len(rows[1])
    timed = ("cost", "seconds", "environment")
    assert all(found[name] == whole[name] for name in whole if name not in timed)
    assert main(["effect", str(tmp_path / "killed")]) == 0
    assert "without a prompt" in capsys.readouterr().out and (tmp_path / "killed" / "report.html").exists()
    assert main(["effect", str(tmp_path / "killed"), "--bins", "5"]) == 2
    assert "config differs (bins: 10 -> 5)" in capsys.readouterr().err


@pytest.mark.slow
def test_answers_that_are_written_are_analysed_too(tiny, tmp_path):
    own = replace(tiny.prompts, task="question_answering", labels=(), measure="", max_new_tokens=4, shots=0)
    found = effect(replace(tiny, prompts=own, most_shots=1, distil_seconds=0.0), tmp_path / "run")
    assert found["measure"] == "token_f1" and "calibration" not in found and "break_even" not in found["cost"]
    assert list(found["sensitivity"]) == ["format"] and found["varied_shots"] == 0
    assert [list(row) for row in found["shots"]["counts"]] == [["shots", "plain"]] * 2
    assert 0 < found["cost"]["with_prompt"]["answer_tokens"] <= 4
