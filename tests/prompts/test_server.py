"""A server that speaks OpenAI's protocol: asked, asked again, refused; and its key told to nobody."""

import contextlib
import json
import threading
from dataclasses import asdict

import pytest
from tiny_server import serving

from kdjax import server as client
from kdjax.errors import UserError
from kdjax.prompts.config import PromptsConfig, SpeakerConfig
from kdjax.prompts.open import open_speaker
from kdjax.prompts.speaker import How
from kdjax.sampling import Sampling
from kdjax.search import search

pytestmark = pytest.mark.timeout(30)
KEY = "sk-secret-1234"


def completion(text):
    return 200, {"choices": [{"message": {"content": text}}], "usage": {"total_tokens": 11}}, {}


@pytest.fixture
def serve(monkeypatch):
    """Serve replies in turn (the last one for ever), each (status, body, headers) or a function of the request."""
    waits = []
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TINY_KEY", KEY)
    monkeypatch.setattr(client.time, "sleep", waits.append)
    with contextlib.ExitStack() as running:

        def start(*replies, **more):
            replies, seen = list(replies), []

            def answer(path, headers, body):
                seen.append((path, headers, body))
                reply = replies.pop(0) if len(replies) > 1 else replies[0]
                return reply(body) if callable(reply) else reply

            url = running.enter_context(serving(answer))
            config = SpeakerConfig(url, "tiny", "TINY_KEY", timeout=5, retries=2, **more)
            return open_speaker(config), seen, waits

        yield start


def test_prompts_are_asked_in_order_and_answers_stopped(serve):
    speaker, seen, _ = serve(lambda body: completion(f"\n{body['messages'][0]['content']}!\nmore"), batch_size=3)
    prompts = [f"prompt {n}" for n in range(7)]
    said = speaker.say(prompts, How(5, ("\n",), Sampling(0.5, top_p=0.9), seed=2**32 - 1))
    assert [s.text for s in said] == [f"{prompt}!" for prompt in prompts] and {s.tokens for s in said} == {11}
    path, headers, body = next(row for row in seen if row[2]["messages"][0]["content"] == "prompt 2")
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body == {
        "model": "tiny", "messages": [{"role": "user", "content": "prompt 2"}], "max_tokens": 5, "temperature": 0.5,
        "top_p": 0.9, "stop": ["\n"], "seed": (2**32 + 1) % 2**31,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "waited"),
    [
        ((503, {}, {}), [1.0, 2.0]),
        ((429, {}, {"Retry-After": "7"}), [7.0, 7.0]),
        ((429, {}, {"Retry-After": "9999"}), [60.0, 60.0]),
        ((200, b"{no json", {}), [1.0, 2.0]),
        ((200, b"{", {"Content-Length": "99"}), [1.0, 2.0]),
    ],
)
def test_what_may_pass_is_tried_again(serve, bad, waited):
    speaker, seen, waits = serve(bad, bad, completion("yes"))
    assert speaker.say(["x"], How(5))[0].text == "yes"
    assert waits == waited and len(seen) == 3


def test_tries_end(serve):
    speaker, seen, waits = serve((500, {"error": f"no {KEY[:2]}"}, {}))
    with pytest.raises(UserError, match="no answer in 3 tries .the last: status 500: .*no sk"):
        speaker.say(["x"], How(5))
    assert len(seen) == 3 and waits == [1.0, 2.0]


def test_no_server_is_one_line(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match="gave no answer in 2 tries"):
        open_speaker(SpeakerConfig("http://127.0.0.1:9/v1", "tiny", retries=1)).say(["x"], How(5))


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((401, {"error": "who?"}, {}), "refuses .status 401: .*who"),
        ((302, {}, {"Location": "http://127.0.0.1:9/elsewhere"}), "refuses .status 302"),
        ((200, {"choices": []}, {}), "wanted a chat completion"),
        ((200, [1], {}), "wanted a chat completion"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(serve, reply, said):
    speaker, seen, waits = serve(reply)
    with pytest.raises(UserError, match=said) as error:
        speaker.say(["x"], How(5))
    assert len(seen) == 1 and waits == [] and KEY not in str(error.value)


def test_a_slow_server_is_given_up(serve):
    release = threading.Event()

    def slow(body):
        release.wait(10)
        return completion("late")

    speaker, _, _ = serve(slow)
    quick = open_speaker(SpeakerConfig(speaker.config.source, "tiny", timeout=0.2, retries=1))
    try:
        with pytest.raises(UserError, match="no answer in 2 tries .the last: .*timed out"):
            quick.say(["x"], How(5))
    finally:
        release.set()


def test_keys_stay_where_they_are(serve, monkeypatch):
    speaker, _, _ = serve(completion("yes"))
    assert KEY not in repr(speaker) + json.dumps(asdict(speaker.config)) + speaker.name
    for wrong in ("", "sk secret", "sk-sécret", "sk\nsecret"):
        monkeypatch.setenv("TINY_KEY", wrong)
        with pytest.raises(UserError, match="TINY_KEY is to hold the key") as error:
            open_speaker(speaker.config)
        assert not wrong or wrong not in str(error.value)


def test_a_server_is_the_scorer_of_written_answers_in_a_search(serve, tmp_path):
    def reply(body):
        prompt = body["messages"][0]["content"]
        return completion(prompt.split("Text: ")[-1].split("\n")[0] if "Repeat" in prompt else "something else")

    speaker, seen, _ = serve(reply, batch_size=4)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"t": f"words number {n}"}) for n in range(60)))
    config = PromptsConfig(
        task="summarising", sources=(f"jsonl:{rows}",), input="{{ t }}", answer="{{ t }}", methods=(), rounds=1,
        instructions=("Sing.", "Repeat it.", "Dance."), budget=30, few_shot_baseline=0, scorer=speaker.config,
        propose_rows=5, select_rows=10, test_rows=10,
    )  # fmt: skip
    found = search(config, tmp_path / "run")
    assert found["best"]["text"] == "Repeat it." and found["test"]["best"]["score"] == 1.0
    assert (
        len(seen) == sum(found["evaluations"].values()) and found["tokens"]["test"] == 11 * found["evaluations"]["test"]
    )
    assert all(KEY not in path.read_text() for path in (tmp_path / "run").iterdir())


def test_a_server_weighs_nothing(serve):
    speaker, seen, _ = serve(completion("yes"))
    with pytest.raises(UserError, match="cannot weigh given answers"):
        speaker.weigh([("x", "y")])
    assert seen == []
