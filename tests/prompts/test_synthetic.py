"""Prompts that are made up: unlike each other, counted where dropped, and the same after a stop."""

import json

import pytest
import tiny_speaker
from tiny_speaker import speaker

from kdjax import synthesis as job
from kdjax.cli import main
from kdjax.errors import UserError
from kdjax.prompts.config import PromptsConfig, SpeakerConfig
from kdjax.prompts.measures import rouge_l
from kdjax.prompts.speaker import How, Said
from kdjax.prompts.synthetic import UNFINISHED, Pool, _tasks
from kdjax.sampling import Sampling
from kdjax.synthesis import synthesise

GIVEN = ("Name three birds of the sea.", "Say why the sky is blue.")


class Writer:
    """Writes two tasks and a half to each prompt; fails at a call if it is to."""

    name = "writer"

    def __init__(self, fails_at=-1):
        self.calls, self.prompts, self.fails_at = 0, [], fails_at

    def say(self, prompts, how):
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        self.prompts += prompts
        near = "Name three birds of the sea now."
        return [
            Said(f"Do {how.seed} with {n} and x{n * how.seed}.\nTask 9: {near}\nTask 10: cut", 9)
            for n in range(len(prompts))
        ]


@pytest.fixture
def write(monkeypatch):
    def use(**more):
        writer = Writer(**more)
        monkeypatch.setattr(job, "open_speaker", lambda spec: writer)
        return writer

    return use


CONFIG = PromptsConfig(
    make="self_instruct", count=9, instructions=GIVEN, proposer=SpeakerConfig("writer", batch_size=3)
)


def test_what_is_near_short_long_or_cut_is_dropped_and_counted():
    pool = Pool(GIVEN)
    near, far = "Name three birds of the lake.", "Name three fish of a lake."  # 5 and 3 of 6 words in common
    assert rouge_l(near, GIVEN[0]) == pytest.approx(5 / 6) and rouge_l(far, GIVEN[0]) == pytest.approx(3 / 6)
    for text in (near, far, far.upper(), "Do it", "word " * 151, "Tell a long story" + UNFINISHED):
        pool.offer(text)
    assert pool.made == [far]
    assert pool.dropped == {"like another one": 2, "too short": 1, "too long": 1, "unfinished": 1}


def test_lists_are_cut_into_tasks():
    assert _tasks("one\n two\nTask 9: three\n10. four") == ["one two", "three", "four" + UNFINISHED]
    assert _tasks("alone") == ["alone"] and _tasks("") == []


def test_self_instruct_shows_the_pool_and_keeps_what_is_new(write, tmp_path):
    writer = write()
    found = synthesise(CONFIG, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "prompts.jsonl").read_text().splitlines()]
    assert found["kept"] == len(rows) == 9 and all(set(row) == {"prompt"} for row in rows)
    texts = [row["prompt"] for row in rows]
    everything = [*GIVEN, *texts]
    assert all(rouge_l(a, b) <= 0.7 for n, a in enumerate(everything) for b in everything[:n])
    assert all(given in prompt for prompt in writer.prompts for given in GIVEN)
    assert any(text in writer.prompts[-1] for text in texts)
    assert found["dropped"]["like another one"] > 0 and found["dropped"]["unfinished"] > 0


def test_it_goes_on_after_a_stop_to_the_same_prompts(write, tmp_path):
    write()
    synthesise(CONFIG, tmp_path / "whole")
    for number in (1, 2):
        write(fails_at=number)
        with pytest.raises(KeyboardInterrupt):
            synthesise(CONFIG, tmp_path / "run")
    last = write()
    synthesise(CONFIG, tmp_path / "run")
    for name in ("prompts.jsonl", "batches.jsonl"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "whole" / name).read_text()
    batches = (tmp_path / "run" / "batches.jsonl").read_text().count("\n")
    assert last.calls == batches - 1


def test_it_ends_where_nothing_new_comes(write, tmp_path, caplog):
    writer = write()
    writer.say = lambda prompts, how: [Said("The same all over again.", 1) for _ in prompts]
    assert synthesise(CONFIG, tmp_path / "run")["kept"] == 1
    assert "brought nothing new, so it ends with 1 prompts" in caplog.text
    writer.say = lambda prompts, how: [Said("", 1) for _ in prompts]
    with pytest.raises(UserError, match="nothing that writer wrote was kept"):
        synthesise(CONFIG, tmp_path / "other")


def test_what_cannot_be_is_refused(write, tmp_path):
    write()
    with pytest.raises(UserError, match="give some as instructions"):
        synthesise(PromptsConfig(make="self_instruct", proposer=SpeakerConfig("writer")), tmp_path / "a")
    with pytest.raises(UserError, match="chat template of a local model; writer is none"):
        synthesise(PromptsConfig(make="magpie", proposer=SpeakerConfig("writer")), tmp_path / "b")
    with pytest.raises(UserError, match="proposer.source names no model"):
        PromptsConfig(make="magpie")


@pytest.mark.slow
def test_turns_are_written_where_the_user_speaks(tmp_path, capsys):
    tiny, how = speaker(1, batch_size=2), How(8, sampling=Sampling(1.0), seed=3)
    turns = tiny.turns(3, how)
    before = "<|im_start|>user\n"
    raw = speaker(1, batch_size=2, chat=False).say([before] * 3, how)
    assert [turn.text for turn in turns] == [said.text for said in raw] and len({turn.text for turn in turns}) == 3
    assert [turn.is_over for turn in turns] == [said.tokens < len(tiny.tokenizer.encode(before)) + 8 for said in raw]
    assert turns == tiny.turns(3, how) != tiny.turns(3, How(8, sampling=Sampling(1.0), seed=4))
    tiny_speaker.write(tmp_path / "model")
    spec = {"source": str(tmp_path / "model"), "batch_size": 2}
    (tmp_path / "c.json").write_text(json.dumps({"make": "magpie", "count": 2, "proposer": spec}))
    main(["prompts", str(tmp_path / "c.json"), "--run-dir", str(tmp_path / "run"), "--proposal-tokens", "12"])
    assert "goes on" not in capsys.readouterr().err and (tmp_path / "run" / "batches.jsonl").exists()
