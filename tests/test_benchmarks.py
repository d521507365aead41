"""The loss's benchmark measures what it says: its arithmetic, its bookkeeping, its table, and its peers' numbers."""

import itertools
import json
import math
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from benchmarks import (
    checkpoint,
    harness,
    knowledge,
    loss,
    loss_compiled,
    loss_peers,
    loss_table,
    models,
    prompts,
    readme,
    screening,
    step,
)
from benchmarks.harness import Trial, Variant
from benchmarks.loss_accuracy import nearly_equal, relative
from benchmarks.loss_cases import (
    DTYPES,
    Case,
    Size,
    beta_of,
    chunked,
    gradients,
    half_masked,
    make_inputs,
    plain,
    problem,
    with_and_without_dw,
)
from kdjax import config as configs
from kdjax.data import invented
from kdjax.errors import UserError
from kdjax.losses import ObjectiveConfig
from kdjax.models import Model, ModelConfig, ModelSpec
from kdjax.models.registry import FAMILIES
from kdjax.plan.flops import Flops

ROOT = Path(__file__).parents[1]
SIZE = Size(12, 40, 5, 7)


def log_softmax(x):
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl(p_log, q_log):
    return (np.exp(p_log) * (p_log - q_log)).sum(-1)


def expected(x, alpha, beta):
    """Return value, dh and dW in float64 numpy, by the formulae: dL/dlogits = q·(g − Σ q·g) with g = df/dq."""
    h, w, t, tw = (np.asarray(a, np.float64) for a in x[:4])
    targets, weight = np.asarray(x.targets_N), np.asarray(x.weight_N, np.float64)[:, None]
    q_log, p_log = log_softmax(h @ w), log_softmax(t @ tw)
    q, p, one = np.exp(q_log), np.exp(p_log), np.eye(w.shape[1])[targets]
    if beta == 0:
        divergence, d = kl(p_log, q_log), q - p
    else:
        m_log = np.log(beta * p + (1 - beta) * q)
        divergence = beta * kl(p_log, m_log) + (1 - beta) * kl(q_log, m_log)
        g = (1 - beta) * (q_log - m_log)
        d = q * (g - (q * g).sum(-1, keepdims=True))
    value = (weight[:, 0] * (-alpha * q_log[np.arange(len(targets)), targets] + (1 - alpha) * divergence)).sum()
    d = weight * (alpha * (q - one) + (1 - alpha) * d)
    return value, d @ w.T, h.T @ d


@pytest.mark.parametrize("way", [plain, chunked])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["forward_kl", "jsd(beta=0.25)"])
def test_both_ways_are_the_loss_that_is_described(way, masked, name):
    x = make_inputs(SIZE, "f32")
    x = half_masked(x) if masked else x
    wanted = expected(x, 0.5, beta_of(name))
    (value, _), (dh, dw) = gradients(way, ObjectiveConfig(alpha=0.5, divergence=name, chunk_tokens=5), x)
    assert value == pytest.approx(wanted[0], rel=1e-5)
    assert relative(dh, wanted[1]) < 1e-5 and relative(dw, wanted[2]) < 1e-5


@pytest.mark.parametrize("name", [name for name, peer in loss_peers.PEERS.items() if not peer.needs_cuda])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.25])
def test_peers_compute_the_same_loss(name, beta):
    pytest.importorskip("torch")
    if name == "Liger compiled":
        pytest.importorskip("liger_kernel")
    try:
        made = loss_peers.PEERS[name].make(0.3, beta)
    except ImportError as error:
        pytest.skip(str(error))
    x = make_inputs(SIZE, "f32")
    found = loss_peers.in_numpy(loss_peers.closure(made, loss_peers.place(problem(x), "cpu"))())
    wanted = expected(x, 0.3 if loss_peers.PEERS[name].has_ce else 0.0, beta)
    assert [relative(a, b) < 1e-5 for a, b in zip(found, wanted, strict=True)] == [True] * 3


def test_bfloat16_goes_to_torch_by_its_bits():
    pytest.importorskip("torch")
    x = np.array([[1.5, -3.0e38], [0.0, 2.0**-130]], ml_dtypes.bfloat16)
    assert np.array_equal(loss_peers.to_torch(x, "cpu").float().numpy(), x.astype(np.float32))


def test_logits_have_the_standard_deviation_that_is_asked_for():
    x = make_inputs(Size(300, 400, 50, 70), "f32", std=0.1)
    for hidden, matrix in ((x.student_ND, x.student_DV), (x.teacher_ND, x.teacher_DV)):
        assert float(jnp.std(hidden @ matrix)) == pytest.approx(0.1, rel=0.1)
    assert float(x.weight_N.sum()) == pytest.approx(1)
    assert int(jnp.count_nonzero(half_masked(x).weight_N)) == 150


def test_nearly_equal_models_have_a_small_divergence():
    x = nearly_equal(make_inputs(SIZE, "f32"))
    assert 0 < expected(x, 0.0, 0.0)[0] < 1e-3


def test_the_floor_and_the_sum_of_dw():
    """2·N·V·(D_s + D_t) + 4·N·V·D_s with N 2, V 3, D 5/7 is 144 + 120."""
    assert Size(2, 3, 5, 7).floor == 264
    size = Size(2, 3, 5, 7)
    assert with_and_without_dw(Case(size, "f32", "x"), 100, True) == (100, 160)
    assert with_and_without_dw(Case(size, "bf16", "x"), 100, True) == (40, 100)
    assert with_and_without_dw(Case(size, "bf16", "x"), 100, False) == (100, 100)


@pytest.mark.parametrize(
    ("name", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd(beta=0.25)", 0.25), ("cosine", None)]
)
def test_the_beta_of_peers(name, beta):
    assert beta_of(name) == beta


def fixed(name, rounds, seconds=0.0, log=None):
    return Variant(name, lambda: log.append(name), rounds, 1.0, lambda run: run())


def test_rounds_are_interleaved_and_begin_with_each_in_turn():
    log = []
    trials = harness.interleave([fixed("a", 3, log=log), fixed("b", 3, log=log), fixed("c", 1, log=log)], least=3)
    assert log == ["a", "b", "c", "b", "a", "a", "b"]
    assert {name: list(of) for name, of in trials.items()} == {"a": [0, 1, 2], "b": [0, 1, 2], "c": [0]}


def test_no_round_begins_after_the_deadline_once_enough_are_done():
    trials = harness.interleave([fixed("a", 9, log=[])], least=2, deadline=0.0)
    assert list(trials["a"]) == [0, 1]


def test_medians_and_ratios_are_of_the_same_rounds():
    base = {0: Trial(1.0, 10), 1: Trial(2.0, 30), 2: Trial(4.0, 20)}
    other = {0: Trial(3.0, None), 1: Trial(4.0, None)}
    assert harness.ratio(other, base) == 2.5 and harness.ratio(other, {2: Trial(1.0, 1)}) is None
    assert harness.summary(base) == {
        "seconds": 2.0,
        "seconds_quartiles": (1.5, 3.0),
        "seconds_min": 1.0,
        "seconds_max": 4.0,
        "rounds": 3,
        "measured_bytes": 30,
    }
    assert harness.summary(other)["measured_bytes"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_what_a_run_adds_at_most():
    kept = np.ones(4_000_000)

    def run():
        first = np.ones(5_000_000)
        del first
        return np.ones(2_000_000)

    found = harness.resident_growth(run)
    if found is None:
        pytest.skip("this kernel does not reset the high-water mark")
    assert 38e6 < found < 46e6 and kept.size
    assert harness.resident_growth(lambda: None) < 4e6


def test_progress_shares_out_what_is_left_of_the_budget():
    progress = harness.Progress(cost=10.0, budget=100.0)
    progress.start = 0.0
    assert harness.Progress(1.0, None).deadline(1.0) == math.inf
    progress.start = harness.time.monotonic()
    progress.drop(5.0)
    assert progress.deadline(1.0) - harness.time.monotonic() == pytest.approx(20, abs=1)
    progress.budget = 0.0
    assert progress.deadline(1.0) <= harness.time.monotonic() and progress.is_over()


def rows(**more):
    here = {"device": "cpu", "platform": "cpu", "devices": 1, "cpu_cores": 2, "commit": "abc", "dirty": False}
    common = {"what": "loss", "kind": "speed", "case": "a case", "at": "1"} | SIZE._asdict()
    common |= {"dtype": "f32", "divergence": "forward_kl", "rounds": 7, "seconds_min": 1.0, "seconds_max": 3.0}
    common |= {"tokens_per_second": 6.0, "floor_share": 0.5, "measured_bytes": 2_000_000, "matmul_flops": 1e12}
    return [
        common | {"variant": name, "seconds": seconds, "ratio_to_plain": seconds / 2, "environment": here} | more
        for name, seconds in (("plain", 2.0), ("chunked", 1.0))
    ]


def test_the_table_shows_the_last_run_of_each_case():
    text = loss_table.markdown([*rows(seconds=9.0), *rows(at="2")])
    lines = [re.sub(r" +", " ", line) for line in text.splitlines()]
    assert "| chunked | 1 (1 to 3) | 7 | 6 | 0.5 | – | 50 % | – | – | 2 |" in lines
    assert not re.search(r"\| 9 ", text) and "commit abc" in text and "1,000 GFLOP/s" in text
    assert "Not measured yet" in loss_table.markdown([])


def test_many_divergences_of_one_size_share_a_table():
    each = [rows(divergence=name, temp_less_dw_bytes=3e6) for name in ("forward_kl", "reverse_kl", "mse", "cosine")]
    text = loss_table.markdown(list(itertools.chain(*each)))
    lines = [re.sub(r" +", " ", line) for line in text.splitlines()]
    assert "| `mse` | f32 | 1 (1 to 3) | 7 | 0.5 | – | 50 % | 3 | 3 |" in lines and text.count("| divergence") == 1
    assert loss_table.markdown(list(itertools.chain(*each[:3]))).count("| variant") == 3


@pytest.mark.parametrize(
    "value, shown", [(None, "–"), (0.44444, "0.444"), (12345.6, "12,346"), (0, "0"), (1e-9, "1.0e-09")]
)
def test_numbers_have_the_digits_one_reads(value, shown):
    assert loss_table._number(value) == shown


def test_a_page_is_filled_between_its_markers(tmp_path):
    harness.append(tmp_path / "loss.jsonl", rows())
    render = partial(readme.render_page, readme.LOSS_BLOCKS, results=tmp_path)
    text = "a\n<!-- loss table: begin -->\nold\n<!-- loss table: end -->\nb\n"
    filled = render(text)
    assert "chunked" in filled and "old" not in filled and filled.startswith("a\n") and filled.endswith("\nb\n")
    assert render(filled) == filled
    assert render("no markers") == "no markers"
    with pytest.raises(SystemExit, match="no <!-- loss table: end"):
        render("<!-- loss table: begin -->")


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_the_pages_show_what_was_measured(page):
    text = page.read_text()
    assert readme.PAGES[page](text) == text, "run python -m benchmarks.readme"


def test_every_family_has_its_row_of_what_it_can_do():
    rows = harness.read(models.RESULTS)
    assert {row["family"] for row in rows} == FAMILIES.keys()
    for row in rows:
        assert max(row["import_error"], row["packed_error"], row["export_error"]) < 1e-5
        assert row.get("greedy_equal", True) and ("greedy_equal" in row) == (row["task"] in ("causal_lm", "seq2seq"))
        assert row["task"] == "embedding" or row["kl_after"] < 0.75 * row["kl_before"]


def test_a_model_is_read_run_and_distilled(monkeypatch):
    """One row made anew: what transformers is not there to say is left out, and the rest is as the tests have it."""
    monkeypatch.setattr(models, "STEPS", 20)
    monkeypatch.setattr(models, "export_error", lambda *_: None)
    row = models.measure(models.GOLDEN / "llama_tied")
    assert row["family"] == "llama" and row["import_error"] < 1e-5 and row["packed_error"] < 1e-5
    assert row["greedy_equal"] and row["kl_after"] < row["kl_before"]
    here = {"environment": {"device": "cpu", "platform": "cpu", "jax": "1.2"}}
    assert "| `llama` | llama_tied | " in models.markdown([row | here]) and "| – |" in models.markdown([row | here])


def test_a_compiled_loss_is_shown_by_its_last_run():
    here = {"jax": "0.10.2", "commit": "abc"}
    row = {"target": "h200", "at": "2", "environment": here, "chunk_tokens": 512, "peak_bytes": 4.5e9}
    row |= {"argument_bytes": 1.68e9, "output_bytes": 0.56e9}
    rows = [row | {"at": "1", "peak_bytes": 9e9}, row, row | {"chunk_tokens": None, "peak_bytes": 2e10}]
    shown = loss_compiled.markdown(rows)
    assert "| 512 | 4.50 | 1.68 | 0.56 |" in shown and "| plain logits | 20.00 |" in shown and "9.00" not in shown
    assert "Compiled for h200, never run there; jax 0.10.2, commit abc." in shown


def test_compiling_for_a_gpu_without_its_compiler_is_one_line(monkeypatch, capsys):
    def unknown(**what):
        raise RuntimeError("no such platform: cuda\nmore")

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", unknown)
    assert loss_compiled.main(["--quick"]) == 2
    said = capsys.readouterr().err
    assert said == 'cannot compile for h200: no such platform: cuda; pip install "jax[cuda13]"\n'


def options(*arguments):
    return loss.parser().parse_args(arguments)


def test_the_default_plan_has_what_is_promised():
    plan = loss.chosen_plan(options())
    large = [case for case in plan if case.size == loss.LARGE]
    assert {(case.divergence, case.dtype) for case in large} == {
        (n, d) for n in ("forward_kl", loss.JSD) for d in DTYPES
    }
    assert all(case.least >= 7 for case in large if case.divergence == "forward_kl")
    assert {case.divergence for case in plan if case.size == loss.SMALL} == {n for n in loss.every() if loss.known(n)}
    assert {case.size for case in loss.chosen_plan(options("--full"))} >= set(loss.SIZES)


def test_options_choose_and_an_unknown_divergence_is_a_line(capsys):
    plan = loss.chosen_plan(
        options("--sizes", "9,8,7,6", "--divergences", "forward_kl", "nonsense", "--dtype", "f32", "--rounds", "4")
    )
    assert plan == [Case(Size(9, 8, 7, 6), "f32", "forward_kl", 4, 4, 4)]
    assert "skipped nonsense" in capsys.readouterr().err
    assert all(case.peer_rounds == 0 for case in loss.chosen_plan(options("--no-peers")))


@pytest.mark.parametrize("wrong", [["--sizes", "1,2,3"], ["--sizes", "1,2,3,x"], ["--rounds", "0"], ["--dtype", "f8"]])
def test_wrong_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        options(*wrong)
    assert "error: argument" in capsys.readouterr().err


def test_what_does_not_fit_is_skipped_with_a_line(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.loss_cases.available_bytes", lambda: 1000)
    case = Case(SIZE, "f32", "forward_kl", 1, 1)
    makers = loss.engine_makers(case, make_inputs(SIZE, "f32"), ObjectiveConfig())
    assert loss._made(case, "plain", makers["plain"]) is None
    assert "skipped plain in forward_kl" in capsys.readouterr().err


def test_sources_are_told_apart_by_commit_and_changes():
    here = harness.environment()
    assert harness.same_sources({"environment": here}, here)
    assert not harness.same_sources({"environment": here | {"dirty": "f00d"}}, here)
    assert harness.same_sources({"environment": here | {"load": here["load"] + 1}}, here), "the load tells no sources"


def test_a_machine_is_named_with_as_much_of_it_as_was_used():
    cpu = {"device": "x86_64", "platform": "cpu", "devices": 8, "cpu_cores": 1, "cpu_model": "EPYC"}
    assert harness.machine(cpu) == "EPYC (cpu, 1 core)"
    assert harness.machine(cpu | {"cpu_model": None, "cpu_cores": 2}) == "x86_64 (cpu, 2 cores)"
    assert harness.machine({"device": "H200", "platform": "gpu", "devices": 8}) == "8 × H200 (gpu)"


def test_when_time_is_over_the_rest_is_skipped_with_a_line(tmp_path, capsys):
    recorder = loss.Recorder(tmp_path / "loss.jsonl", resume=False)
    loss.run_speed([Case(SIZE, "f32", "forward_kl", 1, 1)], recorder, options(), budget=-1.0)
    assert recorder.rows == [] and "no time left; --resume goes on here" in capsys.readouterr().err


@pytest.mark.slow
def test_a_quick_run_records_shows_and_resumes(tmp_path):
    path = tmp_path / "loss.jsonl"
    command = [sys.executable, "-m", "benchmarks.loss", "--quick", "--dtype", "f32", "--divergences", "forward_kl"]
    command += ["--results", str(path), "--resume", "--no-peers"]

    def run(*more):
        found = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert found.returncode == 0, found.stderr
        return found

    first = run()
    kept = path.read_text()
    last = json.loads(first.stdout.splitlines()[-1])
    assert last["rows"] == len(kept.splitlines()) == 6 and "eta" in first.stderr
    by = {row["variant"]: row for row in map(json.loads, kept.splitlines()) if row["kind"] == "speed"}
    assert set(by) == {"plain", "chunked", "chunked, half masked", "matmuls"}
    assert by["chunked, half masked"]["weighted_tokens"] == 32 and by["chunked"]["rounds"] == 2
    assert by["plain"]["ratio_to_plain"] == 1 and by["matmuls"]["floor_share"] == pytest.approx(1)
    again = run()
    assert path.read_text() == kept and json.loads(again.stdout.splitlines()[-1])["rows"] == 6
    assert "<summary>Accuracy of every divergence" in run("--table").stdout


def test_ways_of_a_prompt_say_the_same_and_the_floor_counts_pairs(monkeypatch):
    small = ModelConfig(vocab_size=40_000, width=16, layers=2, heads=2, kv_heads=1, head_width=8, mlp_width=32)
    model, params = Model(small), jax.jit(Model(small).init)(jax.random.key(0))
    monkeypatch.setattr(prompts, "EXAMPLES", 4)
    head = list(range(40))
    layouts = zip(prompts.WAYS, (1, 2, 2), strict=True)
    hiddens = [np.asarray(prompts.run_of(way, model, params, head, each)()) for way, each in layouts]
    prompts.check(hiddens)
    with pytest.raises(SystemExit, match="nothing is measured"):
        prompts.check([hiddens[0], hiddens[0][::-1]])
    matrices = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32)
    pairs = 64 * 40 + 64 * 65 // 2
    assert prompts.floor_operations(small, params, 40) == 4 * (2 * 64 * matrices + 4 * 2 * 16 * pairs)


def test_knowledge_is_shown_by_the_rate_with_most_right():
    def row(rate, accuracy):
        share = {
            "held_out": {"accuracy": accuracy, "interval": [0.1, 0.9]},
            "trained": {"accuracy": 1, "interval": [1, 1]},
        }
        ways = dict.fromkeys(("before", "open book", "after"), share)
        here = {"device": "cpu", "platform": "cpu", "python": "3", "jax": "1.2"}
        known = {"split": "fact", "arm": "distilled", "rate": rate, "steps": 9, "forgetting": None}
        return known | ways | {"environment": here}

    text = knowledge.markdown([row(1e-3, 0.25), row(3e-3, 0.5)])
    assert "| fact | distilled | 0.003 | 50.0 % (10.0 % to 90.0 %) |" in text and "25.0 %" not in text
    assert "Learning rates tried: 0.001, 0.003" in text


def test_a_question_is_held_out_by_its_wording_or_with_its_whole_fact():
    config = configs.load(str(knowledge.RECIPE))
    by = {column: replace(config, data=replace(config.data, group_field=column)) for column in ("id", "fact")}
    held = {column: knowledge._held_out(one) for column, one in by.items()}
    facts_of = {column: {name.rpartition(" ")[0] for name in names} for column, names in held.items()}
    assert len(held["fact"]) == invented.WORDINGS * len(facts_of["fact"])
    assert len(held["id"]) < invented.WORDINGS * len(facts_of["id"])


@pytest.mark.parametrize("name", screening.SCREENED)
def test_a_screened_task_is_balanced_and_large_enough(name):
    examples = screening.balanced(screening.SCREENED[name][1]())
    labels = {example.answer for example in examples}
    assert len(examples) >= 100 + max(screening.SHOTS) and len({example.input for example in examples}) == len(examples)
    assert len({sum(example.answer == label for example in examples) for label in labels}) == 1


def test_lines_that_compile_are_told_by_the_compiler():
    for text, label in screening._valid():
        with nullcontext() if label == "yes" else pytest.raises(SyntaxError):
            compile(text, "line", "exec")


def test_a_task_is_used_where_its_gain_over_the_better_zero_shot_is_sure_to_be_above_five_points():
    def rows(name, calibrated):
        cases = [(n, draw) for n in screening.SHOTS for draw in range(screening.DRAWS if n else 1)]
        known = {
            "task": name,
            "labels": ["a", "b"],
            "majority": 0.5,
            "environment": {"device": "cpu", "platform": "cpu", "jax": "1.2"},
        }
        scores = {"calibrated": [calibrated] * 40}
        return [known | scores | {"shots": n, "draw": draw, "plain": [int(n == 8)] * 40} for n, draw in cases]

    gains, mended, *_ = screening.SCREENED
    found = [*rows(gains, 0), *rows(mended, 1)]  # of the second, what the examples bring calibration brings too
    used, *others = [line for line in screening.markdown(found).splitlines() if line.endswith("used |")]
    assert gains in used and "| plain |" in used and used.endswith("| used |") and "100 % (100 to 100)" in used
    assert len(others) == 3 and all(line.endswith("| not used |") for line in others)
    assert "Not measured yet" in screening.markdown(found[:3])


ENDS = {
    "the rate is -1; wanted more": (UserError("the rate is -1; wanted more"), 2),
    "stopped; rows that were told are kept": (KeyboardInterrupt(), 130),
}
"""What is said -> how a benchmark ends, and its exit code."""


@pytest.mark.parametrize("said", ENDS)
def test_a_benchmark_that_cannot_go_on_says_so_in_one_line(said, capsys):
    error, code = ENDS[said]

    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        harness.leave(main)
    shown = capsys.readouterr().err
    assert ended.value.code == code and said in shown and shown.count("\n") == 1


def test_rows_of_a_step_are_full_and_their_documents_apart():
    config = replace(step.shape(), batch_size=2)
    batch = step.random_batch(config, 4)
    assert batch.student.tokens_BT.shape == (2, 256) and batch.student.segment_BT.max() == 4
    assert batch.kd_weight_BR.sum() == 2 * (256 - 4)  # each document's last token has none after it
    weighed = batch.kd_weight_BR > 0
    np.testing.assert_array_equal(
        batch.targets_BR[:, :-1][weighed[:, :-1]], batch.student.tokens_BT[:, 1:][weighed[:, :-1]]
    )
    with pytest.raises(UserError, match="rows of 256 tokens do not split into 3 documents"):
        step.random_batch(config, 3)


def test_a_models_utilisation_is_of_its_own_time():
    flops = Flops(teacher=30.0, student=20.0, recompute=4.0, loss=10.0, useful=60.0)
    found = step.of_models(flops, {"teacher": 0.5, "student": 0.25, "loss": 0.25}, 100.0)
    assert found == {"utilisation_teacher": 0.6, "utilisation_student": 0.96}
    assert harness.quartiles([1.0, 2.0, 3.0]) == (1.5, 2.5)


def test_a_model_that_is_named_has_its_sizes_and_random_weights():
    spec = step.of_sizes(ModelSpec(source="Qwen/Qwen3-0.6B", dtype="bfloat16"))
    assert (spec.source, spec.dtype, spec.architecture.vocab_size) == ("random", "bfloat16", 151_936)


@pytest.mark.slow
def test_a_step_is_measured_alone_and_beside_another(tmp_path):
    """Its quick form, as a user runs it; of small models, so that it is."""
    sizes = "--{0}.architecture.layers 2 --{0}.architecture.width 64 --{0}.architecture.vocab-size 512".split()
    flags = [flag.format(who) for who in ("teacher", "student") for flag in sizes]
    command = [sys.executable, "-m", "benchmarks.step", *flags, "--results", str(tmp_path / "step.jsonl")]

    def run(*more):
        return subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT, timeout=240)

    alone = run("--rounds", "3")
    row = json.loads(alone.stdout)
    assert row["tokens_per_second"] == pytest.approx(4 * 256 / row["step_seconds"])
    low, high = row["step_seconds_quartiles"]
    assert low <= row["step_seconds"] <= high and row["rounds"] == 3
    assert sum(row["shares"].values()) == pytest.approx(1) and row["peak_memory_gb"] > 0.1
    assert row["bytes"]["optimizer"] > 2 * row["bytes"]["student"] > 0
    (kept,) = harness.read(tmp_path / "step.jsonl")
    assert kept == row and step.markdown([kept]) in alone.stderr
    two = json.loads(run("--quick", "--against", "--mesh.placement pmap").stdout)["rows"]
    assert [one["mesh"]["placement"] for one in two] == ["jit", "pmap"] and two[0]["ratio"] is None
    assert two[1]["ratio"] > 0 and len(harness.read(tmp_path / "step.jsonl")) == 1
    wrong = run("--documents", "7")
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr.count("\n") == 1


TRIALS = {
    "arms": (("--arms", "16 soft tokens, prompt", "--tries", "1"), lambda row: row["places"] == 16),
    "gist": ((), lambda row: row["places"] == 8 and row["recovered_prompts"] > 0),
    "kinds": (("--kinds", "classifier", "--seeds", "0"), lambda row: row["objective"] == "data alone"),
    "knowledge": (("--arms", "distilled", "--splits", "fact", "--rates", "3e-3"), lambda row: row["recovered"] < 1),
    "memory": ((), lambda row: row["kept"] == "int4" and row["kl_quantized"] > 0),
    "models": ((), lambda row: row["import_error"] < 1e-4),
    "plans": ((), lambda row: row["plan"]["topology"] == "cpu:2"),
    "prompt_distill": (("--arms", "control", "--seeds", "1"), lambda row: row["recovered_prompts"] > 0),
    "quickstart": (("--seeds", "1"), lambda row: row["objective"] == "unigram" and row["perplexity_after"] < 264),
    "scaling": ((), lambda row: row["devices"] == 2 and row["sent_bytes"] > 0),
    "screening": (("--tasks", "line compiles"), lambda row: row["shots"] == 8 and len(row["plain"]) == 6),
    "students": ((), lambda row: row["by"] == "untrained" and row["kl"] > 0),
}
"""Experiment -> flags of its trial, and what holds of the last row."""


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIALS)
def test_a_trial_of_an_experiment_ends_with_its_row_and_keeps_nothing(name, tmp_path):
    flags, holds = TRIALS[name]
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", *flags, "--results", str(tmp_path / "kept.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stderr
    assert holds(json.loads(done.stdout.splitlines()[-1])) and not list(tmp_path.iterdir())


READ = {
    "effect": ((), "**"),
    "pipeline": ((), "distilled, without it"),
    "search": (("prompt_question_answering",), "unseen examples, one search"),
    "divergences": ((), "forward_kl"),
}
"""What ends in a text for people -> flags of its trial, and what is in the text."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flags", "said"), [(name, *what) for name, what in READ.items()])
def test_a_trial_that_a_person_reads_keeps_nothing(name, flags, said, tmp_path):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", *flags, "--results", str(tmp_path / "kept")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert done.returncode == 0 and said in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


QUICK = {
    "start": (),
    "data": (),
    "cache": (),
    "generate": (),
    "prompts": (),
    "teachers": ("--arms", "12 draws, 8 bits"),
    "answers": ("--arms", "its own and the teacher's together, MiniLLM"),
    "tokenizers": ("--arms", "ALM"),
    "quality": ("--arms", "forward KL, T = 1"),
    "teacher": ("--teacher.architecture.layers", "2", "--against", "--teacher.dtype bfloat16"),
    "checkpoint": ("--stretch", "4", "--teacher.architecture.layers", "2", "--student.architecture.layers", "1"),
}
"""Benchmark -> further flags of its quick form."""


def test_every_benchmark_is_named_on_the_page_and_has_a_quick_form_that_is_tested():
    commands = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "COMMAND:" in path.read_text("utf-8")}
    by_themselves = {"loss", "step", "peers", "loss_compiled"}
    assert commands == {*TRIALS, *READ, *QUICK, *by_themselves, "readme"}
    page = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    assert commands == set(re.findall(r"python -m benchmarks\.(\w+)", page))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flags"), QUICK.items())
def test_a_quick_form_ends_with_its_figures_and_keeps_nothing(name, flags, tmp_path):
    kept = tmp_path / "kept.jsonl"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", *flags, "--results", str(kept)]
    command += ["--home", str(tmp_path)] if name == "quality" else []
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not kept.exists()
    if name == "start":
        assert 0 < found["ratio"] < 1 and found["warm_compiled_seconds"] < found["cold_compiled_seconds"]
    elif name == "cache":
        some, more, draws = found["rows"]
        assert some["bytes_per_token"] < more["bytes_per_token"] and more["error"] < some["error"]
        assert all(0.5 < row["gradient_ratio"] < 10 for row in found["rows"])
        assert draws["error_of_mean"] < 0.8 * draws["error"] and draws["seeds"] == 4  # about half
    elif name == "teachers":
        assert found["arm"] == "12 draws, 8 bits" and 0 < found["bytes_per_token"] < 200
        assert 0 < found["kl_after"] != found["kl_before"] > 0 and found["made_seconds"] > 0
    elif name == "answers":
        assert found["own_share"] == 1 and 0 < found["generation_seconds"] and 0 < found["own_kl"] < 1
    elif name == "tokenizers":
        assert found["arm"] == "ALM" and 0 < found["kl_after"] and 4 < found["ce_after"] < 7
    elif name == "quality":
        assert found["what"] == "pace" and found["arm"] == "forward KL, T = 1" and found["rounds"] == 2
        step, tokens, kl, *_ = json.loads(done.stdout.splitlines()[-2])["curve"][-1]
        assert (step, tokens) == (2, 2 * 8 * 256) and kl > 0
    elif name == "teacher":
        whole, half = found["rows"]
        assert whole["hidden_tokens_per_second"] > whole["whole_tokens_per_second"] > 0
        assert half["dtype"] == "bfloat16" and half["bytes"] == whole["bytes"] / 2 and 0 < half["hidden_mfu"] < 2
    elif name == "generate":
        assert found["what"] == "shared prefix" and 0 < found["seconds_same"] < found["seconds_apart"]
    elif name == "prompts":
        assert found.pop("128 in each row") == 1 and all(times > 1 for times in found.values()) and len(found) == 2
    elif name == "data":
        assert set(found) == {"python_docs concat", "python_docs first_fit"} and min(found.values()) > 1000
    else:
        assert found["bytes"] > 12 * 49_152 * 384  # parameters and both moments
        assert 0 < found["stall_seconds"] < found["restore_seconds"] + found["written_seconds"]


def test_the_table_of_saves_says_what_one_costs():
    row = {"student": "s", "bytes": 3e8, "step_seconds": 2.0, "stall_seconds": 0.5, "stall_steps": 0.25}
    row |= {"cost_steps": 0.6, "cost_steps_range": (0.5, 0.7), "written_seconds": 3.0, "restore_seconds": 1.0}
    here = {"device": "d", "platform": "cpu", "python": "3", "jax": "0", "commit": "c"}
    assert "| s | 300 MB | 2.00 s | 0.50 s, 0.25 steps | 0.60 (0.50 to 0.70) | 3.0 s | 1.0 s |" in checkpoint.markdown(
        [row | {"environment": here}]
    )
