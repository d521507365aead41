"""The teacher's cache: what is read from it is what it says live, whatever stopped its writing, and no other's."""

# ruff: noqa: F811

import json
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from test_build import config, directory, exported, refused  # noqa: F401
from test_context import LONG_RULES, made, ruled  # noqa: F401

from kdjax import label as labels
from kdjax.answers import answered
from kdjax.build import build
from kdjax.cli import main
from kdjax.data import cached, open_cache
from kdjax.data.cache import inspected, of_record, record
from kdjax.data.packing import SAID
from kdjax.data.signals import packed
from kdjax.errors import UserError
from kdjax.label import label, verified
from kdjax.losses import ObjectiveConfig
from kdjax.metrics import read
from kdjax.step import gradient
from kdjax.teacher import LabelConfig
from kdjax.train import train

home = tiny_run.home
PLAIN = ObjectiveConfig(alpha=0.3, temperature=1.0)


@pytest.fixture(scope="module")
def plain(config):
    """Six batches of a run whose teacher computes in bfloat16, so that its hidden states are kept whole."""
    config = replace(config, prompt="", objective=PLAIN, steps=6, label=LabelConfig(shard_rows=32))
    return replace(config, teacher=replace(config.teacher, dtype="bfloat16"))


@pytest.fixture(scope="module")
def written(plain, tmp_path_factory):
    """A cache of each kind: kind -> (the config, the directory)."""
    home = tmp_path_factory.mktemp("caches")
    kinds = {
        "hidden": LabelConfig("hidden", 0, 16),
        "topk": LabelConfig("topk", 264, 16),
        "sampled": LabelConfig("sampled"),
    }
    found = {}
    for kind, how in kinds.items():
        found[kind] = replace(plain, label=replace(how, shard_rows=32)), home / kind
        label(*found[kind])
    return found


def gradients(job, number):
    """Of the first batches: numpy."""
    state, frozen, of = job.start(), job.frozen(), jax.jit(partial(gradient, job.recipe))
    batches = job.data.train(None, prefetch=0)
    return [
        jax.tree.map(np.asarray, of(state, *job.given(frozen, next(batches)[0], trains=True))) for _ in range(number)
    ]


def files(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.array_record")}


@pytest.mark.parametrize(("kind", "off"), [("hidden", 1e-6), ("topk", 4e-3)])
def test_gradients_are_those_of_the_live_teacher(plain, written, kind, off):
    """All entries of the vocabulary, kept in 16 bits, are the whole distribution but for their rounding."""
    labelled, directory = written[kind]
    cached_job = build(replace(labelled, cache=str(directory)))
    for (got, parts), (want, wanted) in zip(gradients(cached_job, 3), gradients(build(plain), 3), strict=True):
        for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert np.abs(ours - theirs).max() <= off * max(np.abs(theirs).max(), 1e-8)
        assert parts["ce"] == pytest.approx(wanted["ce"], rel=1e-6)
        assert parts["kd"] == pytest.approx(wanted["kd"], rel=10 * off)


def test_what_a_prompted_teacher_says_is_kept_without_its_prompt(made, tmp_path):
    """Its view stands behind a prefix that all share; what reads the cache needs neither."""
    prompted = ruled(replace(made, steps=3, objective=PLAIN, label=LabelConfig("hidden")), LONG_RULES)
    prompted = replace(prompted, teacher=replace(prompted.teacher, dtype="bfloat16"))
    label(prompted, tmp_path / "cache")
    live, cached_job = build(prompted), build(replace(prompted, cache=str(tmp_path / "cache")))
    assert len(live.data.shared) and not len(cached_job.data.shared)
    assert not any(name.startswith("teacher_") for name in open_cache(tmp_path / "cache").row("train", 0))
    for (got, parts), (want, wanted) in zip(gradients(cached_job, 3), gradients(live, 3), strict=True):
        for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert np.abs(ours - theirs).max() <= 1e-5 * max(np.abs(theirs).max(), 1e-8)
        assert parts["kd"] == pytest.approx(wanted["kd"], rel=1e-5) and parts["kd"] > 0
    rows = Path(prompted.data.sources[0].removeprefix("jsonl:"))
    rows.write_text(rows.read_text().replace("f", "g"))
    with pytest.raises(UserError, match="was labelled otherwise .*order.documents"):
        label(prompted, tmp_path / "cache")


def test_draws_are_of_what_the_teacher_says(written, plain):
    """Their log-probabilities are the teacher's, and draws of many rows come as often as they are likely."""
    labelled, directory = written["sampled"]
    live = build(plain)
    frozen, batch = live.frozen(), next(live.data.train(None, prefetch=0))[0]
    signal_of = live.recipe.signal_of(frozen, live.place.put_batch(batch))
    head = np.asarray(signal_of.head.w_DV, np.float32)
    logits_NV = np.asarray(signal_of.hidden_ND, np.float32) @ head
    wanted_NV = logits_NV - np.log(np.exp(logits_NV).sum(1, keepdims=True))
    brought = next(build(replace(labelled, cache=str(directory))).data.train(None, prefetch=0))[0].signal["said"]
    ids, weights = (brought[name].reshape(len(wanted_NV), -1) for name in ("ids", "weights"))
    counts_N = batch.kd_weight_BR.ravel() != 0
    np.testing.assert_allclose(weights.sum(1), counts_N, atol=1e-6)
    said = np.take_along_axis(wanted_NV, ids, 1)
    got = brought["log_probs"].reshape(said.shape)
    assert np.abs(np.where(weights > 0, got - said, 0)).max() < 0.05
    drawn_V, likely_V = np.zeros(264), np.exp(wanted_NV[counts_N]).sum(0)
    np.add.at(drawn_V, ids.ravel(), weights.ravel())
    assert np.abs(drawn_V - likely_V).sum() < 0.35 * likely_V.sum() and drawn_V.sum() == pytest.approx(likely_V.sum())


@pytest.mark.slow
def test_a_run_goes_as_with_the_live_teacher_and_goes_on_bit_for_bit(written, tmp_path, plain):
    labelled, directory = written["hidden"]
    from_cache = replace(labelled, cache=str(directory))
    live, whole = train(plain, tmp_path / "live"), train(from_cache, tmp_path / "whole")
    for name in ("kl_before", "kl_after", "perplexity_after", "perplexity_teacher"):
        assert whole[name] == pytest.approx(live[name], rel=1e-5)
    assert "bytes_teacher" not in whole and whole["teachers_flops"] == 0 and live["teachers_flops"] > 0.1
    steady = replace(from_cache, optim=replace(from_cache.optim, schedule="constant"))
    train(steady, tmp_path / "through")
    train(replace(steady, steps=4), tmp_path / "part")
    saved = json.loads((tmp_path / "part" / "config.json").read_text())
    (tmp_path / "part" / "config.json").write_text(json.dumps(saved | {"steps": 6}))
    train(steady, tmp_path / "part")
    losses = [
        [row["loss"] for row in read(tmp_path / run / "metrics.jsonl") if "loss" in row] for run in ("through", "part")
    ]
    assert len(losses[0]) == 6 and losses[0] == losses[1]


def test_rows_come_in_their_order_then_shuffled_and_in_batches_of_any_size(written):
    cache = open_cache(written["topk"][1])

    def tokens(batch_size, batches, **process):
        stream = cached(cache, 0, batch_size=batch_size, **process).train(None, prefetch=0)
        return np.concatenate([next(stream)[0].student.tokens_BT for _ in range(batches)])

    rows = cache.count("train")
    assert rows == 6 * 16
    whole = tokens(16, 12)
    np.testing.assert_array_equal(tokens(4, 24), whole[:rows])
    again = {row.tobytes() for row in whole[rows:]}
    assert again == {row.tobytes() for row in whole[:rows]} and not np.array_equal(whole[:rows], whole[rows:])
    halves = [tokens(16, 2, process_index=n, process_count=2) for n in range(2)]
    np.testing.assert_array_equal(np.concatenate([half[:8] for half in halves]), whole[:16])
    with pytest.raises(UserError, match="has 96 rows; wanted at least batch_size, 128"):
        cached(cache, 0, batch_size=128)


@pytest.mark.parametrize("kind", ["sampled"])
def test_what_was_stopped_anywhere_ends_with_the_same_bytes(written, tmp_path, monkeypatch, kind):
    labelled, directory = written[kind]
    wanted, write = files(directory), labels.write_shard
    for stop in (1, len(wanted) - 1):
        left = iter(range(stop))

        def stops(path, contents, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return write(path, contents)

        monkeypatch.setattr(labels, "write_shard", stops)
        with pytest.raises(KeyboardInterrupt):
            label(labelled, tmp_path / str(stop))
        with pytest.raises(UserError, match="no finished cache.*goes on with the same `kdjax label`"):
            open_cache(tmp_path / str(stop))
        monkeypatch.setattr(labels, "write_shard", write)
        label(labelled, tmp_path / str(stop))
        assert files(tmp_path / str(stop)) == wanted


def test_a_shard_that_is_cut_or_changed_is_named_and_written_anew(written, tmp_path):
    labelled, directory = written["topk"]
    own = tmp_path / "own"
    label(labelled, own)
    wanted, (victim, *_) = files(own), sorted(own.glob("train-00001*"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 3] ^= 1
    victim.write_bytes(content)
    assert inspected(own)["damaged"] == [victim.name]
    with pytest.raises(UserError, match=f"{victim.name} is damaged at record .*kdjax label` again"):
        for index in range(open_cache(own).count("train")):
            open_cache(own).row("train", index)
    victim.write_bytes(wanted[victim.name][:-5000])
    assert inspected(own)["damaged"] == [victim.name]
    size, whole = len(wanted[victim.name]) - 5000, len(wanted[victim.name])
    with pytest.raises(UserError, match=f"{victim.name} has {size:,} bytes; wanted {whole:,} bytes"):
        open_cache(own)
    victim.unlink()
    with pytest.raises(UserError, match=f"{victim.name} is not there"):
        open_cache(own)
    label(labelled, own)
    assert files(own) == wanted and inspected(own)["damaged"] == []
    assert verified(own, 2) == {
        "verified_rows": 32,
        "largest_difference": 0.0,
        "tokens_of_other_entries": 0,
    }


def test_other_entries_than_the_teacher_says_today_are_counted(written, tmp_path):
    """Draws of another seed: of hardly any token all are the same."""
    own = shutil.copytree(written["sampled"][1], tmp_path / "own")
    assert verified(own, 1)["tokens_of_other_entries"] == 0
    saved = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(saved | {"label": saved["label"] | {"seed": 5}}))
    found = verified(own, 1)
    assert found["tokens_of_other_entries"] > 0.9 * 16 * 31 and found["largest_difference"] > 0


def test_what_is_written_stays_where_the_disk_is_full(written, tmp_path):
    labelled, directory = written["topk"]
    wanted = files(directory)
    most = sorted(len(content) for content in wanted.values())[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most - 1, hard))
    try:
        with pytest.raises(OSError, match="cannot be written"):
            label(labelled, tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not list((tmp_path / "full").glob("*.draft"))
    label(labelled, tmp_path / "full")
    assert files(tmp_path / "full") == wanted


OTHERS = {
    "teacher": lambda config: replace(config, seed=1),
    "data.sequence_length: 32 -> 16": lambda config: replace(config, data=replace(config.data, sequence_length=16)),
    "data.eval_fraction: 0.05 -> 0.1": lambda config: replace(config, data=replace(config.data, eval_fraction=0.1)),
    "temperature 1, which cannot be re-tempered, but objective.temperature is 2": lambda config: replace(
        config, objective=replace(config.objective, temperature=2.0)
    ),
    "needs all of the teacher's logits": lambda config: replace(
        config, objective=replace(config.objective, divergence="mse")
    ),
}


@pytest.mark.parametrize("said", OTHERS)
def test_trap_20_a_cache_of_something_else_is_refused(written, said):
    labelled, directory = written["topk"]
    other = replace(OTHERS[said](labelled), cache=str(directory))
    if "logits" in said:
        with pytest.raises(UserError, match=said):
            gradients(build(other), 1)
    else:
        refused(other, said)


def test_trap_18_hidden_states_are_good_at_any_temperature(written, plain):
    labelled, directory = written["hidden"]
    hotter = {"objective": replace(PLAIN, temperature=4.0, divergence="reverse_kl")}
    got = gradients(build(replace(labelled, cache=str(directory), **hotter)), 1)[0][1]
    want = gradients(build(replace(plain, **hotter)), 1)[0][1]
    assert got["kd"] == pytest.approx(want["kd"], rel=1e-5)


def test_another_cache_in_its_place_is_refused(written, tmp_path):
    labelled, _ = written["topk"]
    other = replace(labelled, label=replace(labelled.label, picks=8))
    label(other, tmp_path / "cache")
    with pytest.raises(UserError, match="was labelled otherwise .*kept.train.picks: 8 -> 264"):
        label(labelled, tmp_path / "cache")


WRONG = {
    "the config has no teacher": {"teacher": None},
    "makes the teacher another one at every step": {
        "teacher_follows": "student",
        "student": lambda config: replace(config.student, source="teacher"),
    },
    "compares inner layers": {
        "objective": lambda config: replace(config.objective, features=({"kind": "hidden_mse"},)),
    },
}


@pytest.mark.parametrize("said", WRONG)
def test_what_a_cache_cannot_give_is_refused(plain, said):
    changed = {name: of(plain) if callable(of) else of for name, of in WRONG[said].items()}
    with pytest.raises(UserError, match=f"cache is 'somewhere', but .*{said}"):
        replace(plain, cache="somewhere", **changed)


def test_sums_of_two_temperatures_are_not_labelled(plain, tmp_path):
    objective = replace(PLAIN, temperature="linear(4, 1)")
    with pytest.raises(UserError, match="compares at the temperatures 1, 4, but a top-k"):
        label(replace(plain, objective=objective), tmp_path)
    with pytest.raises(UserError, match="placed by jit"):
        label(replace(plain, mesh=replace(plain.mesh, placement="pmap")), tmp_path)


def test_on_the_command_line(home, capsys, tmp_path):
    recipe, out = str(home / "tiny.py"), str(tmp_path / "cache")
    assert main(["label", recipe, out, "--label.picks", "9", "--label.batches", "2"]) == 0
    shown = capsys.readouterr()
    assert "the 9 likeliest entries of a token at temperature 1" in shown.out
    assert f"train on it: kdjax train {out}/config.json --cache {out}" in shown.out and "eta" in shown.err
    assert main(["cache", "inspect", out, "--verify", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 32 and found["largest_difference"] == 0 and found["damaged"] == []
    assert main(["label", recipe]) == 2 and "which config" not in capsys.readouterr().err
    assert main(["cache", "inspect", str(tmp_path)]) == 2
    assert "is no finished cache: it has no manifest.json" in capsys.readouterr().err
    assert main(["plan", recipe, "--topology", "cpu:1", "--cache", out]) == 2
    assert "a plan is of a teacher that is run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_while_labelling_it_ends_with_the_same_bytes(home, tmp_path):
    flags = ["--label.shard-rows", "16", "--steps", "40"]

    def finished(out):
        done = tiny_run.run(home, "label", "tiny.py", out, *flags)
        assert done.returncode == 0, done.stderr
        return files(out)

    wanted, out = finished(tmp_path / "whole"), tmp_path / "killed"
    for shards in (3, 17):
        command, quiet = tiny_run.command("label", "tiny.py", out, *flags), subprocess.DEVNULL
        with subprocess.Popen(command, cwd=home, env=tiny_run.environment(home), stderr=quiet, stdout=quiet) as job:
            limit = time.monotonic() + tiny_run.LIMIT_SECONDS
            while len(list(out.glob("train-*.array_record"))) < shards and time.monotonic() < limit:
                time.sleep(0.01)
            job.kill()
    assert 17 <= len(list(out.glob("train-*.array_record"))) < 40
    assert finished(out) == wanted and len(wanted) > 40


def test_what_any_process_lacks_all_run_the_teacher_for(monkeypatch):
    assert labels._left([True, False, True]) == [0, 2]
    others = np.array([[False, False, True], [False, True, False]])
    monkeypatch.setattr(labels.jax, "process_count", lambda: 2)
    monkeypatch.setattr(labels.multihost_utils, "process_allgather", lambda mine: others)
    assert labels._left([False, True, False]) == [1, 2]


def test_the_teachers_own_view_is_not_kept(written):
    labelled, directory = written["topk"]
    cache = open_cache(directory)
    own = {name: np.arange(32, dtype=np.int32) for name in ("teacher_tokens", "teacher_weight")}
    row = cache.row("train", 0)
    said = {name: row[f"{SAID}{name}"] for name in ("ids", "log_probs", "log_tail")} | {"log_z": np.zeros(32)}
    plain_row = {name: x for name, x in row.items() if not name.startswith(SAID)}
    kind, how = cache.settings("train")
    again = of_record(record(plain_row | own, packed(kind, said, 31, how)), kind, how)
    assert set(again) == set(row)


def test_answers_are_not_sampled_again_where_a_cache_has_them(plain, tmp_path):
    asked = replace(plain, cache="somewhere", answers=replace(plain.answers, by="teacher"))
    assert answered(asked, tmp_path) is asked.data and not list(tmp_path.iterdir())
