"""A teacher behind a server: its cache is that of the same teacher here, whatever goes wrong on the way."""

# ruff: noqa: F811

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
from test_build import config, directory, exported  # noqa: F401
from test_context import LONG_RULES, made, ruled  # noqa: F401
from tiny_server import Spoken, serving

from kdjax import label as labels
from kdjax import remote
from kdjax import server as client
from kdjax.answers import ANSWERS, PROGRESS, write_answers
from kdjax.build import build
from kdjax.cli import main
from kdjax.data import open_cache
from kdjax.data.cache import inspected
from kdjax.data.packing import SAID
from kdjax.errors import UserError
from kdjax.fields import to_json
from kdjax.jobs import evaluate_run
from kdjax.label import label, verified
from kdjax.losses import ObjectiveConfig
from kdjax.models import ModelSpec
from kdjax.plan.abstract import abstract_job
from kdjax.remote import TeacherServerConfig, Wanted, asking, requests_of
from kdjax.sampling import AnswersConfig, Sampling
from kdjax.teacher import LabelConfig
from kdjax.train import train

pytestmark = pytest.mark.timeout(240)
KEY = "sk-secret-1234"
PLAIN = ObjectiveConfig(alpha=0.3, temperature=1.0)


@pytest.fixture(scope="module", autouse=True)
def at_home():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1")
        patch.setenv("TINY_KEY", KEY)
        yield


@pytest.fixture(scope="module")
def local(config):
    """A run of three batches whose teacher is here."""
    how = LabelConfig("topk", 20, 16, shard_rows=16)
    return replace(config, prompt="", objective=PLAIN, steps=3, label=how)


@pytest.fixture(scope="module")
def spoken(local):
    return Spoken(build(local))


@pytest.fixture(scope="module")
def address(spoken):
    with serving(spoken) as url:
        yield url


@pytest.fixture(scope="module")
def served(local, address):
    return behind(local, address)


def behind(local, address, **more):
    """The same run, its teacher behind a server."""
    server = TeacherServerConfig(address, "tiny", **{"key_variable": "TINY_KEY", "timeout": 20, "retries": 1} | more)
    return replace(local, teacher=None, teacher_server=server)


@pytest.fixture(scope="module")
def cache(served, tmp_path_factory):
    directory = tmp_path_factory.mktemp("served") / "cache"
    label(served, directory)
    return directory


def files(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.array_record")}


def same_say(ours, theirs, split):
    """Both caches have the same rows, entries and, but for rounding, log-probabilities."""
    ours, theirs = open_cache(ours), open_cache(theirs)
    assert ours.count(split) == theirs.count(split) > 0
    for number in range(ours.count(split)):
        got, want = ours.row(split, number), theirs.row(split, number)
        assert set(got) == set(want)
        for name in want:
            if name.startswith(SAID) and name != f"{SAID}ids":
                off = 4e-3 if name.endswith("tail") else 1e-4
                np.testing.assert_allclose(got[name], want[name], atol=off, rtol=2e-3)
            else:
                np.testing.assert_array_equal(got[name], want[name])


def test_trap_3_the_cache_is_that_of_the_same_teacher_here(local, served, cache, tmp_path):
    label(local, tmp_path / "local")
    same_say(cache, tmp_path / "local", "train")
    of_sglang = replace(served, teacher_server=replace(served.teacher_server, protocol="sglang"))
    label(of_sglang, tmp_path / "sglang")
    assert files(tmp_path / "sglang") == files(cache)


def test_a_prompted_teacher_is_asked_behind_its_prompt(made, tmp_path):
    local = ruled(replace(made, steps=3, objective=PLAIN, label=LabelConfig("topk", 9, 16)), LONG_RULES)
    local = replace(local, student=ModelSpec(source=local.teacher.source))
    job = build(local)
    assert len(job.data.shared) > 30
    spoken = Spoken(job)
    with serving(spoken) as address:
        label(behind(local, address), tmp_path / "served")
    label(local, tmp_path / "local")
    same_say(tmp_path / "served", tmp_path / "local", "train")
    assert all(body["prompt"][: len(job.data.shared)] == list(job.data.shared) for _, _, body in spoken.seen)


@pytest.mark.slow
def test_a_run_from_it_asks_nobody_and_its_kl_is_a_lower_bound(local, served, cache, spoken, address, tmp_path):
    whole = replace(served, label=replace(served.label, picks=264))
    label(whole, tmp_path / "whole")
    asked = len(spoken.seen)
    live = train(local, tmp_path / "live")
    same = train(replace(whole, cache=str(tmp_path / "whole")), tmp_path / "same")
    for name in ("kl_before", "kl_after", "agreement_after"):
        assert same[name] == pytest.approx(live[name], rel=5e-3)
    assert same["perplexity_after"] == pytest.approx(live["perplexity_after"], rel=1e-4)
    assert same["teacher"] == f"tiny at {address}" and "perplexity_teacher" not in same
    few = train(replace(served, cache=str(cache)), tmp_path / "few")
    assert 0 < few["kl_before"] < live["kl_before"]
    assert evaluate_run(tmp_path / "few")["kl"] == pytest.approx(few["kl_after"], rel=1e-5)
    assert main(["report", str(tmp_path / "few"), "--out", str(tmp_path / "report.html")]) == 0
    assert "tiny → " in (tmp_path / "report.html").read_text()
    assert len(spoken.seen) == asked


def test_a_cache_of_another_teacher_is_refused(local, served, cache):
    other = replace(served, teacher_server=replace(served.teacher_server, model="large"), cache=str(cache))
    with pytest.raises(UserError, match="teacher: 'tiny at http://.*' -> 'large at http://.*'"):
        build(other)
    with pytest.raises(UserError, match="teacher: 'tiny at http://.*' -> .random seed-0-.*teacher_dtype: None -> "):
        build(replace(local, cache=str(cache)))
    with pytest.raises(UserError, match="was labelled otherwise .*kept.*picks: 20 -> 5"):
        label(replace(served, label=replace(served.label, picks=5)), cache)


def test_it_is_looked_into_and_asked_anew(cache, capsys):
    assert verified(cache, 1) == {"verified_rows": 16, "largest_difference": 0.0, "tokens_of_other_entries": 0}
    assert main(["cache", "inspect", str(cache), "--verify", "1"]) == 0
    shown = capsys.readouterr().out
    assert "tiny at http://127.0.0.1" in shown and "computed in" not in shown
    assert "the 20 likeliest entries of a token at temperature 1" in shown and not inspected(cache)["damaged"]


def test_what_stopped_in_the_middle_goes_on_to_the_same_bytes(served, cache, spoken, tmp_path):
    """The server dies after some requests, and is there again."""
    left = iter(range(60))

    def dies(path, headers, body):
        return spoken(path, headers, body) if next(left, None) is not None else (500, {"error": "gone"}, {})

    out = tmp_path / "cache"
    with serving(dies) as address:
        dying = replace(served, teacher_server=replace(served.teacher_server, source=address, retries=0))
        with pytest.raises(UserError, match="gave no answer in 1 tries .the last: status 500: .*gone"):
            label(dying, out)
        done = set(files(out))
        assert 0 < len(done) < len(files(cache)) and not list(out.glob("*.draft"))
        left = iter(range(10**6))
        kept = {name: (out / name).stat().st_mtime_ns for name in done}
        label(dying, out)
        assert kept == {name: (out / name).stat().st_mtime_ns for name in done}
    assert files(out) == files(cache)


def test_the_key_is_told_to_the_server_alone(served, cache, spoken, tmp_path):
    assert {headers["Authorization"] for _, headers, _ in spoken.seen} == {f"Bearer {KEY}"}
    assert all(KEY.encode() not in path.read_bytes() for path in cache.iterdir())
    assert KEY not in to_json(served) + repr(served)
    for address in ("http://me:sk-1@host/v1", "http://host/v1?key=sk-1"):
        with pytest.raises(UserError, match="holds more than where the server is") as caught:
            behind(served, address)
        assert "sk-1" not in str(caught.value)


@pytest.mark.parametrize("reply", [(401, {"error": f"{KEY} is not known"}, {}), (200, b"<html>", {})])
def test_on_the_command_line_it_is_one_line_without_the_key(served, reply, tmp_path, capsys):
    (tmp_path / "config.json").write_text(to_json(served))
    with serving(lambda *_: reply) as address:
        flags = ["--teacher-server.source", address, "--teacher-server.retries", "0"]
        assert main(["label", str(tmp_path / "config.json"), str(tmp_path / "out"), *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "tiny at http://127.0.0.1" in said and KEY not in said
    assert all(KEY not in path.read_text() for path in (tmp_path / "out").iterdir())


VLLM = [None, {"5": {"logprob": -0.5}, "6": {"logprob": -1.5}}, {"7": {"logprob": -0.1}, "8": {"logprob": -3}}]


def of_vllm(found):
    return {"choices": [{"prompt_logprobs": found}]}


def of_sglang(found):
    return {"meta_info": {"input_top_logprobs": found}}


ROW = {
    "tokens": np.array([1, 2, 3, 0]),
    "tokens_segment_ids": np.array([1, 1, 1, 0]),
    "weight": np.array([1, 1, 1, 0.0]),
}


def ask(reply, picks=2, vocab_size=10, **more):
    """What is made of a row of three tokens, or why nothing."""
    with serving(lambda *_: reply if isinstance(reply, tuple) else (200, reply, {})) as address:
        server = TeacherServerConfig(address, "tiny", retries=0, timeout=5, **more)
        with asking(server, Wanted(picks, vocab_size)) as asked:
            return asked([ROW])()[0]


def test_likely_entries_and_the_mass_of_others():
    kept = ask(of_vllm([None, VLLM[2] | {"0": {"logprob": -9999.0}}, VLLM[1]]))
    np.testing.assert_array_equal(kept["ids"], [[7, 8], [5, 6]])
    np.testing.assert_allclose(kept["log_probs"], [[-0.1, -3], [-0.5, -1.5]])
    np.testing.assert_allclose(kept["log_tail"], np.log(1 - np.exp([[-0.1, -3], [-0.5, -1.5]]).sum(1)), rtol=1e-5)
    rounded = ask(
        of_sglang([None, [[-0.001, 3, None], [-6.5, 4, "x"]], [[0.0, 1, None], [-20.0, 2, None]]]), protocol="sglang"
    )
    assert np.isfinite(rounded["log_tail"]).all() and (rounded["log_tail"] == np.log(np.float32(2**-23))).all()


BAD = {
    "replied .*wanted the log-probabilities of a prompt's tokens, as vllm gives them: mend teacher_server.protocol": (
        of_sglang([]),
        [1, 2],
        {"choices": []},
        {"choices": [{"text": "x", "prompt_logprobs": None}]},
        of_vllm([None, {"x": {"logprob": 1}}, {}]),
        of_vllm([None, {"5": {"logprob": None}}, {}]),
        of_vllm([None, {"5": -1.0}, {}]),
    ),
    "log-probabilities of 2 tokens; wanted 3, all of the prompt": (of_vllm(VLLM[:2]),),
    "gave 1 log-probabilities of a token; wanted 2: start vLLM with --max-logprobs 2 ": (
        of_vllm([None, VLLM[1], {"5": {"logprob": -1}}]),
    ),
    "gave 0 log-probabilities of a token; wanted 2: .*--no-enable-prefix-caching": (of_vllm([None, None, VLLM[1]]),),
    "named the entry 10, but the student's vocabulary has 10; wanted a teacher of the same tokenizer": (
        of_vllm([None, VLLM[1], VLLM[2] | {"10": {"logprob": -4}}]),
    ),
    "which are no log-probabilities: their mass is above 1": (
        of_vllm([None, VLLM[1], {"5": {"logprob": 12.5}, "6": {"logprob": -1}}]),
        of_vllm([None, VLLM[1], {"5": {"logprob": -0.1}, "6": {"logprob": -0.1}}]),
        of_vllm([None, VLLM[1], {"5": {"logprob": float("nan")}, "6": {"logprob": -1}}]),
    ),
    "gave no answer in 1 tries .the last: Expecting": ((200, b"<html>", {}),),
    "refuses .status 400: .*greater than max allowed: 20": (
        (400, {"error": "Requested prompt logprobs of 64, which is greater than max allowed: 20"}, {}),
    ),
}


@pytest.mark.parametrize(("said", "reply"), [(said, reply) for said, replies in BAD.items() for reply in replies])
def test_a_bad_reply_is_one_line(said, reply):
    with pytest.raises(UserError, match=said) as caught:
        ask(reply)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("tiny at http://127.0.0.1:")


def test_a_server_that_is_too_slow_is_given_up():
    release = threading.Event()

    def slow(*request):
        release.wait(10)
        return 200, of_vllm(VLLM), {}

    with serving(slow) as address:
        server = TeacherServerConfig(address, "tiny", retries=0, timeout=0.2)
        try:
            with pytest.raises(UserError, match="no answer in 1 tries .the last: .*timed out"):
                with asking(server, Wanted(2, 10)) as asked:
                    asked([ROW])()
        finally:
            release.set()


def test_a_busy_server_is_asked_again(monkeypatch):
    waits, busy = [], [(503, {}, {"Retry-After": "0"})] * 2
    monkeypatch.setattr(client.time, "sleep", waits.append)
    with serving(lambda *_: busy.pop() if busy else (200, of_vllm(VLLM), {})) as address:
        with asking(TeacherServerConfig(address, "tiny", retries=2), Wanted(2, 10)) as asked:
            assert asked([ROW])()[0]["ids"].tolist() == [[5, 6], [7, 8]]
    assert waits == [0.0, 0.0]


def test_several_requests_are_under_way_at_once():
    together = threading.Barrier(4, timeout=20)

    def waits(*request):
        together.wait()
        return 200, of_vllm(VLLM), {}

    with (
        serving(waits) as address,
        asking(TeacherServerConfig(address, "tiny", batch_size=4, retries=0), Wanted(2, 10)) as asked,
    ):
        assert len(asked([ROW] * 8)()) == 8


def test_requests_keep_their_distance(monkeypatch):
    """Thirty a minute: one every two seconds, tries again among them, from whatever thread."""
    now, slept, lock = [100.0], [], threading.Lock()

    def sleep(seconds):
        with lock:
            slept.append(seconds)

    monkeypatch.setattr(client.time, "sleep", sleep)
    monkeypatch.setattr(client.time, "monotonic", lambda: now[0])
    with serving(lambda *_: (200, of_vllm(VLLM), {})) as address:
        with asking(TeacherServerConfig(address, "tiny", requests_per_minute=30), Wanted(2, 10)) as asked:
            asked([ROW] * 5)()
            assert sorted(slept) == [2.0, 4.0, 6.0, 8.0]
            now[0] = 200.0
            asked([ROW])()
    assert len(slept) == 4


def test_only_what_is_compared_is_asked():
    row = {
        "tokens": np.array([9, 9, 9, 9, 9, 9, 0]),
        "tokens_segment_ids": np.array([1, 1, 2, 2, 2, 3, 0]),
        "weight": np.array([0, 1, 0, 1, 1, 1, 0.0]),
        "teacher_tokens": np.array([1, 2, 3, 4, 5, 6, 7, 8, 0]),
        "teacher_tokens_segment_ids": np.array([1, 1, 1, 2, 2, 2, 3, 3, 0]),
        "teacher_weight": np.array([0, 0, 1, 0, 1, 1, 0, 0, 0.0]),
    }
    assert requests_of(row, (11, 12)) == [([11, 12, 1, 2, 3], [4]), ([11, 12, 4, 5, 6], [3, 4])]
    plain = {name: values for name, values in row.items() if not name.startswith("teacher_")}
    assert requests_of(plain, (11, 12)) == [([9, 9], [1]), ([9, 9, 9], [1, 2])]
    assert requests_of({name: 0 * values for name, values in row.items()}, ()) == []


WRONG = {
    "label.kind is 'hidden', but tiny at .* set it to topk": {"label": LabelConfig("hidden")},
    "label.kind is 'sampled', but tiny at .* set it to topk": {"label": LabelConfig("sampled")},
    "compares at temperature 2, but tiny at .*, at temperature 1; set it to 1": {
        "objective": replace(PLAIN, temperature=2.0)
    },
}


@pytest.mark.parametrize("said", WRONG)
def test_what_a_server_does_not_tell_is_refused_before_it_is_asked(served, spoken, said, tmp_path):
    asked = len(spoken.seen)
    with pytest.raises(UserError, match=said):
        label(replace(served, **WRONG[said]), tmp_path)
    assert len(spoken.seen) == asked


def test_one_process_asks_about_next_tokens(served, spoken, tmp_path, monkeypatch):
    asked, encoder = (
        len(spoken.seen),
        replace(served.student.architecture, causal=False, family="bert", head_transform="gelu"),
    )
    masked = replace(served, student=replace(served.student, architecture=encoder))
    with pytest.raises(UserError, match="the student is made for masked_lm, but tiny at .* is asked for next tokens"):
        label(masked, tmp_path)
    monkeypatch.setattr(labels.jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="2 processes were started, but one asks tiny at .*; label with one"):
        label(served, tmp_path)
    assert len(spoken.seen) == asked


def test_what_a_server_cannot_be_is_refused(local, served, tmp_path, capsys):
    with pytest.raises(UserError, match="teacher_server is tiny at .*, but the config has a teacher"):
        replace(served, teacher=local.teacher)
    with pytest.raises(UserError, match="but student.source is 'teacher', whose weights a server does not give"):
        replace(served, student=replace(served.student, source="teacher"))
    with pytest.raises(UserError, match="teacher_server.source is 'somewhere'; wanted where a server is"):
        behind(local, "somewhere")
    with pytest.raises(UserError, match="teacher_server.requests_per_minute is -1; wanted at least 0"):
        behind(local, "http://host/v1", requests_per_minute=-1)
    with pytest.raises(UserError, match="a plan is of a teacher that is run: leave it out"):
        abstract_job(served, labels.jax.devices())
    with pytest.raises(UserError, match="teacher_server is asked before training, not by its steps"):
        train(served, tmp_path)
    (tmp_path / "config.json").write_text(to_json(served))
    assert main(["label", str(tmp_path / "config.json"), str(tmp_path / "out"), "--label.kind", "sampled"]) == 2
    assert "set it to topk" in capsys.readouterr().err


@pytest.fixture
def asked(made, tmp_path):
    """A run whose prompts a teacher answers, here."""
    (tmp_path / "asked.jsonl").write_text("\n".join(json.dumps({"prompt": str(n)}) for n in range(120)))
    answers = AnswersConfig(by="teacher", count=50, tokens=6, sampling=Sampling(0.7), batch_size=20)
    sources = (f"jsonl:{tmp_path / 'asked.jsonl'}",)
    student = ModelSpec(source=made.teacher.source)
    return replace(made, student=student, answers=answers, data=replace(made.data, sources=sources))


def test_its_answers_are_those_of_the_same_teacher_here(asked, tmp_path):
    spoken = Spoken(build(replace(asked, answers=AnswersConfig(), data=made_of(asked))))
    for name in ("here", "served", "broken"):
        (tmp_path / name).mkdir()
    write_answers(asked, tmp_path / "here")
    wanted = (tmp_path / "here" / ANSWERS).read_bytes()
    with serving(spoken) as address:
        far = behind(asked, address)
        write_answers(far, tmp_path / "served")
    assert len(wanted.splitlines()) > 20 and (tmp_path / "served" / ANSWERS).read_bytes() == wanted
    dropped = [json.loads((tmp_path / name / PROGRESS).read_text())["dropped"] for name in ("here", "served")]
    assert dropped[0] == dropped[1] and len(spoken.seen) == 50
    left = iter(range(30))  # a batch and a half
    with serving(lambda *request: spoken(*request) if next(left, None) is not None else (400, {}, {})) as address:
        near = replace(far, teacher_server=replace(far.teacher_server, source=address, batch_size=1))
        with pytest.raises(UserError, match="refuses .status 400"):
            write_answers(near, tmp_path / "broken")
        assert json.loads((tmp_path / "broken" / PROGRESS).read_text())["done"] == 20
        left = iter(range(99))
        write_answers(near, tmp_path / "broken")
    assert (tmp_path / "broken" / ANSWERS).read_bytes() == wanted
    few = {"steps": 3, "objective": replace(PLAIN, alpha=1.0)}
    summary = train(replace(far, **few), tmp_path / "served")  # its server has gone
    assert summary["ce_after"] < summary["ce_before"] and "kl_after" not in summary


def made_of(asked):
    """Data of rows that are answered already, to build a job of."""
    return replace(asked.data, sources=(asked.data.sources[0].replace("asked", "rows"),))


def test_how_it_writes():
    """What is sampled by is sent, an answer's end only where no thoughts stand before it."""
    seen = []

    def writes(path, headers, body):
        seen.append(body)
        return 200, {"choices": [{"text": f" {body['prompt'][0]}"}]}, {}

    answers = AnswersConfig(by="teacher", tokens=7, sampling=Sampling(0.5, 3, 0.9, 0.1), stop=("\n",), seed=5)
    with serving(writes) as address:
        server = TeacherServerConfig(address, "tiny", batch_size=1)
        assert remote.written(server, answers, [[1, 2], [3]], 8) == [" 1", " 3"]
        remote.written(server, replace(answers, scratchpad="So:", sampling=Sampling()), [[4]], 0)
    assert seen[1] == {
        "model": "tiny", "prompt": [3], "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1,
        "stop": ["\n"], "seed": 14,
    }  # fmt: skip
    assert set(seen[2]) == {"model", "prompt", "max_tokens", "temperature", "top_p", "seed"}
    for reply in ({"choices": [{}]}, {"choices": [{"text": None}]}, [], "x"):
        with serving(lambda *_, reply=reply: (200, reply, {})) as address:
            with pytest.raises(UserError, match="replied .*; wanted a completion"):
                remote.written(TeacherServerConfig(address, "tiny", retries=0), answers, [[1]], 0)
