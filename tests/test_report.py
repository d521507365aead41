"""The HTML report: what it shows, of whatever is left of a run, and that it trusts none of it."""

import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.errors import UserError
from kdjax.metrics import JsonlWriter
from kdjax.report import default_out, words, write_report
from kdjax.report.plots import plots, series, short, smooth, thin
from kdjax.report.run import Run, load_run

CONFIG = {
    "name": "quickstart",
    "teacher": {"source": "smollm2-135m-instruct"},
    "student": {"source": "teacher", "keep_layers": [0, 1, 4]},
    "objective": {"alpha": 0.1, "temperature": 2.0, "divergence": "forward_kl"},
    "optim": {"name": "adamw", "learning_rate": 0.001},
    "steps": 20,
    "seed": 0,
}
SUMMARY = {
    "name": "quickstart",
    "kl_before": 10.85,
    "kl_after": 1.534,
    "perplexity_teacher": 13.46,
    "perplexity_before": 693_842.0,
    "perplexity_after": 64.46,
    "agreement_before": 0.003,
    "agreement_after": 0.396,
    "ce_after": 4.166,
    "parameters_teacher": 134_515_008,
    "parameters_student": 77_987_520,
    "tokens_per_second_teacher": 2570.0,
    "tokens_per_second_student": 5140.0,
    "tokens_per_second_train": 1950.0,
    "seconds": 261.4,
    "steps": 20,
    "eval_tokens": 16_384,
    "held_out_sha256": "ab" * 32,
    "prompt": "A list is",
    "continuations": {"teacher": " good", "student before": " of of", "student after": " a list"},
    "environment": {"device": "cpu", "jax": "0.10.2", "commit": "769f554"},
    "notes": ["The text is still rough."],
}
PRETRAINED = {"perplexity_before": 49_021.0, "perplexity_after": 92.24, "parameters_student": 1_234_567, "steps": 20}


def make_run(path, config=CONFIG, summary=SUMMARY, teacher=True, steps=20):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    writer = JsonlWriter(path / "metrics.jsonl")
    for step in range(1, steps + 1):
        row = {"loss": 9 / step, "ce": 10 / step, "learning_rate": 1e-3, "grad_norm": 1.0}
        row |= {"kd": 8 / step, "agreement": 0.02 * step} if teacher else {}
        writer.write(step, row | {"tokens_per_second": math.nan if step == 1 else 1950.0})
        if step % 10 == 0:
            held_out = {"eval_kl": 10 / step, "eval_agreement": 0.02 * step} if teacher else {}
            writer.write(step, {"eval_perplexity": 900.0 / step} | held_out)
    writer.close()
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


class Page(HTMLParser):
    """What a browser would see: text, tags, ids, and whatever an attribute refers to."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.words, self.tags, self.ids, self.references, self.handlers = [], [], [], [], []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            self.ids += [value] if name == "id" else []
            self.handlers += [name] if name.startswith("on") else []
            self.references += [value] if name in {"src", "href", "xlink:href", "action", "data"} else []
            self.references += [part.split(")")[0] for part in (value or "").split("url(")[1:]]

    def handle_data(self, data):
        self.words.append(data)


def report(*runs, out=None):
    return Page(write_report(runs, out or default_out(runs)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def page(run):
    return report(run)


def test_a_report_shows_every_figure_of_the_run(page):
    for text in (
        *("smollm2-135m-instruct → 3 of its layers", "divergence forward KL", "temperature 2.0", "10.85 → 1.534"),
        *("0.3 % → 39.6 %", "134.5 M → 78.0 M", "0.58 × the teacher's", "2,570 → 5,140", "2.00 × the teacher's"),
        *("693,842 → 64.46", "teacher 13.46", "4:21", "1,950 tokens/s in training", "4.166", "16,384", "ab" * 32),
        *("A list is", "of of", "The text is still rough.", "769f554", '"keep_layers": ['),
    ):
        assert text in page.text, text


def test_a_report_plots_everything_the_run_measured(page):
    assert page.tags.count("figure") == 6
    for title in (
        "Training loss",
        "Held-out KL to the teacher",
        "Held-out perplexity",
        "Gradient norm",
        "Learning rate",
    ):
        assert title in page.text
    assert "cross entropy" in page.text and "divergence" in page.text


def test_a_report_needs_nothing_beside_itself(page):
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert page.references and all(reference.startswith("#") for reference in page.references)
    assert not page.handlers and "@import" not in page.source and "http" not in page.source.replace("http-equiv", "")


def test_ids_of_all_plots_are_apart_and_every_reference_has_its_target(page):
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references} <= set(page.ids)


def test_colours_and_font_of_plots_are_the_pages_own(page):
    svgs = page.source[page.source.index("<figure") :]
    assert "stroke: var(--curve-0)" in svgs and "fill: var(--muted)" in svgs and "font-family: inherit" in svgs
    assert "#0000" not in svgs and "DejaVu" not in svgs


def test_commands_are_quoted_for_the_shell(tmp_path):
    run = make_run(tmp_path / "it's $(here)")
    commands = dict(words.commands(load_run(run)))
    assert commands["evaluate again"] == f"kdjax evaluate '{tmp_path}/it'\"'\"'s $(here)'"
    assert commands["ten times longer"].endswith("-longer' --steps 200")


def test_text_of_strangers_stays_text(tmp_path):
    evil = "</pre></style><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202e\ud800{{ 7 * 7 }}"
    config = CONFIG | {"name": evil, "teacher": {"source": evil}, evil: evil}
    summary = SUMMARY | {
        "prompt": evil,
        "continuations": {evil: evil, "student after": evil},
        "environment": {evil: evil},
        "notes": [evil],
        "held_out_sha256": evil,
        "kl_after": evil,
    }
    bad = make_run(tmp_path / "<script>alert(3)<", config, summary)
    good = make_run(tmp_path / "good")
    for page in (report(bad), report(bad, good, out=tmp_path / "both.html")):
        assert not {"script", "img"} & set(page.tags) and not page.handlers
        assert "<script>alert(1)</script><img src=x onerror=alert(2)>\\x1b[31m\\u202e\\ud800{{ 7 * 7 }}" in page.text
        assert "\x1b" not in page.source and "\u202e" not in page.source


def test_pre_training_has_no_word_of_a_teacher(tmp_path):
    random = {"source": "random", "architecture": {"family": "llama", "layers": 4, "width": 256}}
    config = CONFIG | {"teacher": None, "student": random}
    page = report(make_run(tmp_path / "pretrain", config, PRETRAINED, teacher=False))
    body = page.text.split("All fields, as resolved")[0].replace(str(tmp_path), "")  # its name is random
    assert "a new llama of 4 layers and width 256, pre-trained" in body and "49,021 → 92.24" in body
    assert page.tags.count("figure") == 4
    for word in ("KL", "teacher", "divergence", "agreement", "cross entropy"):
        assert word not in body, word


@pytest.mark.parametrize(
    "file, content, says",
    [
        ("metrics.jsonl", None, "No curves: metrics.jsonl has no rows yet."),
        ("metrics.jsonl", b"", "No curves: metrics.jsonl has no rows yet."),
        ("metrics.jsonl", b'{"step": 1, "loss": 2.0}\nbroken\n{"step": 3}\n', "line 2 is damaged"),
        ("summary.json", None, "No final figures: the run is still going, or was stopped at step 20;"),
        ("summary.json", b'{"kl_after": 1', "summary.json is damaged"),
        ("summary.json", b"[1]", "wanted a JSON object, got '[1]'"),
        ("summary.json", b"\xff\xfe\xfd", "summary.json is damaged"),
    ],
)
def test_what_is_missing_or_damaged_is_said_and_the_rest_is_shown(tmp_path, file, content, says):
    run = make_run(tmp_path / "run")
    (run / file).unlink()
    if content is not None:
        (run / file).write_bytes(content)
    page = report(run)
    assert says in page.text
    assert ("Training loss" in page.text) == (file == "summary.json")
    assert ("0.3 % → 39.6 %" in page.text) == (file == "metrics.jsonl")


def test_a_run_on_its_way_shows_what_was_known_before(tmp_path):
    before = {
        name: value for name, value in SUMMARY.items() if "after" not in name and name not in {"steps", "seconds"}
    }
    page = report(make_run(tmp_path / "run", summary=before))
    assert "still going, or was stopped at step 20" in page.text
    assert "student before 693,842 10.85 0.3 %" in page.text and "10.85 →" not in page.text
    assert "Perplexity 13.46" not in page.text and "134.5 M → 78.0 M" in page.text


def test_a_torn_last_line_costs_that_line_alone(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 21, "lo')
    assert load_run(run).rows[-1]["step"] == 20 and not load_run(run).problems


@pytest.mark.parametrize("content, says", [(None, "no config.json in it"), (b"{", "damaged"), (b"3", "damaged")])
def test_what_is_no_run_is_refused_in_one_line(tmp_path, content, says):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        report(tmp_path)
    assert "is no run directory" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_no_run_and_an_out_that_is_a_directory_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="no run to report on"):
        write_report([], tmp_path / "x.html")
    with pytest.raises(UserError, match="cannot be written"):
        write_report([run], tmp_path)


def test_where_reports_go(tmp_path, run):
    assert default_out([tmp_path]) == tmp_path / "report.html"
    assert str(default_out([tmp_path, run])) == "report.html"
    assert write_report([run], tmp_path / "new" / "page.html").is_file()


def test_several_runs_stand_side_by_side_and_the_best_is_marked(tmp_path, run):
    hot = CONFIG | {"objective": CONFIG["objective"] | {"temperature": 4.0}}
    figures = {"kl_after": 1.2, "agreement_after": 0.41, "perplexity_after": 70.1, "tokens_per_second_train": 1800.0}
    other = make_run(tmp_path / "hot", hot, SUMMARY | figures)
    page = report(run, other, out=tmp_path / "both.html")
    assert "2 runs compared" in page.text and "objective.temperature 2.0 4.0" in page.text
    assert "objective.alpha 0.1" not in page.text
    assert page.tags.count("figure") == 6
    best = page.source.split('class="best">')[1:]
    assert [cell.split("<")[0] for cell in best] == ["1.200", "41.0 %", "64.46", "1,950"]
    legend = page.source.split('class="legend">')[1].split("</ul>")[0]
    assert legend.count("<li>") == 2 and "--curve-0" in legend and "--curve-1" in legend


def test_figures_of_different_held_out_texts_are_not_ranked(tmp_path, run):
    other = make_run(tmp_path / "other", summary=SUMMARY | {"kl_after": 1.2, "held_out_sha256": "cd" * 32})
    page = report(run, other, out=tmp_path / "both.html")
    assert "different held-out texts" in page.text and 'class="best"' not in page.source


def test_runs_of_one_name_are_told_apart_and_one_run_is_one_run(tmp_path, run):
    other = make_run(tmp_path / "quickstart")
    page = report(run, other, out=tmp_path / "both.html")
    assert str(run) in page.text and str(other) in page.text
    assert "runs compared" not in report(run, run / ".." / run.name, out=tmp_path / "one.html").text


def test_many_runs_with_nothing_in_common(tmp_path, run):
    pretrained = make_run(tmp_path / "pretrained", CONFIG | {"teacher": None}, PRETRAINED, teacher=False)
    unfinished = make_run(tmp_path / "unfinished", CONFIG, None)
    empty = make_run(tmp_path / "empty", {}, {}, steps=0)
    page = report(run, pretrained, unfinished, empty, out=tmp_path / "all.html")
    assert "unfinished No final figures" in page.text and "teacher.source" in page.text
    assert page.tags.count("figure") == 6


def test_without_evaluations_on_the_way_curves_run_from_before_to_after():
    svgs = plots({"": ([], SUMMARY)})
    assert [svg.split('aria-label="')[1].split('"')[0] for svg in svgs] == [
        "Held-out KL to the teacher",
        "Same top token as the teacher",
        "Held-out perplexity",
    ]
    assert ">10.85</text>" in svgs[0] and ">1.534</text>" in svgs[0] and ">teacher</text>" in svgs[2]


def test_the_scale_is_logarithmic_where_values_span_much():
    def ticks(values):
        rows = [{"step": step, "loss": value} for step, value in enumerate(values)]
        return plots({"": (rows, {})})[0]

    assert ">0.01</text>" in ticks([10.0, 1.0, 0.1, 0.01]) and ">0.01</text>" not in ticks([10.0, 9.0, 8.0])
    assert ">0</text>" in ticks([1.0, 0.0]) and ticks([math.nan, 3.0])


def test_series_takes_rows_that_have_the_name_and_numbers_alone():
    steps, values = series([{"step": 1, "x": 2}, {"step": 2}, {"step": 3, "x": "?"}, {"step": 4, "x": math.inf}], "x")
    assert steps.tolist() == [1, 3, 4] and values[0] == 2 and np.isnan(values[1:]).all()


def test_smoothing_keeps_a_straight_line_and_passes_over_nan():
    line = np.arange(200.0)
    assert np.allclose(smooth(line)[5:-5], line[5:-5])
    line[50] = np.nan
    assert np.isfinite(smooth(line)).all() and abs(smooth(line)[50] - 50) < 1
    assert np.isnan(smooth(np.full(5, np.nan))).all()


def test_thinning_keeps_order_and_spikes():
    steps, values = np.arange(10_000.0), np.sin(np.arange(10_000.0))
    values[1234], values[7777] = 50.0, -50.0
    few_steps, few_values = thin(steps, values, 600)
    assert len(few_steps) <= 600 and (np.diff(few_steps) > 0).all()
    assert few_values.max() == 50 and few_values.min() == -50
    assert (values[few_steps.astype(int)] == few_values).all()


@pytest.mark.parametrize(
    "value, text", [(0.0002, "0.0002"), (1500, "1,500"), (20_000, "20 k"), (2.5e6, "2.5 M"), (0, "0")]
)
def test_ticks(value, text):
    assert short(value) == text


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    config=st.dictionaries(st.sampled_from([*CONFIG, "x"]), ANY),
    summary=st.dictionaries(st.sampled_from([*SUMMARY, "x"]), ANY),
)
@settings(max_examples=100, deadline=None)
def test_words_come_of_any_json_whatever(tmp_path_factory, config, summary):
    run = Run(tmp_path_factory.getbasetemp() / "run", config, [], summary, [])
    for text in (words.what(config), *words.how(config), words.pretty(config)):
        assert isinstance(text, str)
    words.headlines(summary), words.facts(summary), words.commands(run), words.last_words(summary)
    assert words.differences([config, config]) == []
    for _, cells in words.compared([run, run]):
        assert len(cells) == 2 and not any(cell.is_best for cell in cells)


def test_a_report_says_what_was_trained_and_what_quantising_costs(tmp_path):
    student = {"source": "teacher", "lora": {"rank": 8}, "trained": ["final_norm", "layers/mlp"]}
    teacher = {"source": "smollm2-135m-instruct", "quantize": "int4"}
    config, summary = CONFIG | {"student": student, "teacher": teacher}, SUMMARY | {"kl_quantized": 0.0123}
    run = make_run(tmp_path / "run", config, summary | {"bytes_teacher": 90_027_264})
    page = Page(write_report([run], tmp_path / "page.html"))
    for said in ("smollm2-135m-instruct in int4 → a copy of itself", "LoRA of rank 8", "final_norm, layers/mlp"):
        assert said in page.text
    assert "0.012" in page.text and "90.0 M bytes" in page.text


def test_a_report_says_what_of_a_prompt_was_recovered(tmp_path):
    own = {"recovered": 0.912, "recovered_interval": [0.887, 0.934], "recovered_prompts": 48, "recovered_own": 0.871}
    own |= {
        "saved": {"prompt_tokens": 179.0},
        "continuations": {"with the prompt": "Ahoy!", "distilled, without": "Ay!"},
    }
    page = Page(write_report([make_run(tmp_path / "run", CONFIG, SUMMARY | own)], tmp_path / "page.html"))
    for said in (
        "91.2 %",
        "95 % interval 88.7 % to 93.4 %, 48 held-out prompts",
        "179 tokens",
        "87.1 % recovered on",
        "Ay!",
    ):
        assert said in page.text
    damaged = SUMMARY | own | {"recovered_interval": [1], "saved": "much", "recovered_own": "most"}
    Page(write_report([make_run(tmp_path / "other", CONFIG, damaged)], tmp_path / "page.html"))
