"""Training a gist: its vectors and adapters move and nothing else, and prompts never seen are compressed."""

# ruff: noqa: F811

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_run
from test_build import SMALL, base, config, exported, refused, taught_by  # noqa: F401
from test_frozen import next_batch

from kdjax import data
from kdjax.build import build
from kdjax.checkpoint import open_params
from kdjax.cli import main
from kdjax.errors import UserError
from kdjax.jobs import evaluate_run, export_run, generate_texts
from kdjax.losses import one_device
from kdjax.models import Model, ModelSpec, open_model
from kdjax.models.config import GIST, Lora, SoftPrompt
from kdjax.models.paths import parameter_paths
from kdjax.sampling import AnswersConfig
from kdjax.step import loss_sums, normalised
from kdjax.train import train

home = tiny_run.home
COUNT = 2


@pytest.fixture(scope="module")
def made(config, base, tmp_path_factory):
    """A student with adapters and a gist, which stands behind a word that is another one in each row."""
    rng, home = np.random.default_rng(0), tmp_path_factory.mktemp("rows")
    rows = [
        {"word": "".join(rng.choice(list("abcdefgh"), 3)), "prompt": "?", "answer": "".join(rng.choice(list("xyz"), 5))}
        for _ in range(300)
    ]
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = taught_by(config, base, source="teacher", lora=Lora(rank=4))
    views = {"student_view": "{{ word }}{{ gist }}{{ prompt }}", "teacher_view": "{{ word }}{{ prompt }}"}
    own = replace(made.data, sources=(f"jsonl:{home / 'rows.jsonl'}",), packing="first_fit", **views)
    own = replace(own, group_field="word", eval_fraction=0.2, eval_tokens=1024, dedupe_ngram=0)
    answers = AnswersConfig(tokens=4, unrelated=())
    made = replace(made, data=own, student=replace(made.student, gist=COUNT))
    return replace(made, prompt="", objective=replace(made.objective, alpha=0.0), answers=answers)


@pytest.mark.slow
def test_the_adapters_and_the_vectors_alone_are_trained(made):
    job = build(made)
    state, frozen, batch = job.start(), job.frozen(), next_batch(job)
    of_base = parameter_paths(open_model(made.teacher.source).tensors)
    for path, leaf in parameter_paths(frozen["student"]).items():
        np.testing.assert_array_equal(leaf, of_base[path].all())
    before = jax.device_get(state.params["student"])
    assert before[GIST]["embedding"].shape == (COUNT, SMALL.width)
    after, metrics = job.step(state, frozen, batch)
    moved = parameter_paths(jax.device_get(after.params["student"]))
    assert {path.rpartition("/")[2] for path in moved} == {"embedding", "lora_a", "lora_b"}
    assert not np.allclose(moved[f"{GIST}/embedding"], before[GIST]["embedding"])
    for path, leaf in parameter_paths(frozen["student"]).items():
        np.testing.assert_array_equal(leaf, of_base[path].all(), err_msg=path)
    assert np.isfinite(metrics["loss"])


@pytest.mark.slow
def test_packed_rows_have_the_loss_and_the_gradient_of_each_example_alone(made):
    job = build(made)
    recipe, state, frozen = replace(job.recipe, shard=one_device), job.start(), job.frozen()
    rows = job.data.held_out[:2]
    examples = data.examples_of(rows)
    assert len(examples) > 3 and all(one.student[3:5] == [-1, -2] for one in examples)

    def of(batch):
        weighed = normalised(batch, lambda x: x)[0]
        sums = jax.value_and_grad(lambda params: loss_sums(recipe, params, frozen, weighed)[0])
        return jax.device_get(sums(state.params))

    packed = data.packing.to_batch(rows)
    assert float(packed.kd_weight_BR.sum()) == sum(len(one.answer) for one in examples)
    one, other = of(packed), of(data.in_rows(examples))
    assert one[0] == pytest.approx(other[0], rel=1e-5) and one[0] > 1e-3
    for path, leaf in parameter_paths(one[1]["student"]).items():
        np.testing.assert_allclose(parameter_paths(other[1]["student"])[path], leaf, atol=1e-6, err_msg=path)


@pytest.fixture(scope="module")
def trained(made, home):
    """A run of a gist beside all weights, and what it says of words that it has never seen."""
    made = replace(made, student=replace(made.student, lora=Lora()), steps=60, eval_every=0)
    made = replace(made, optim=replace(made.optim, learning_rate=1e-2))
    return made, home / "gist", train(made, home / "gist")


@pytest.mark.slow
def test_prompts_never_seen_are_compressed(trained):
    _, run, summary = trained
    assert summary["kl_after"] < summary["kl_before"]
    low, high = summary["recovered_interval"]
    assert 0.1 < low < summary["recovered"] < high and summary["recovered_prompts"] > 20
    assert summary["recovered_swapped_interval"][1] < low < summary["recovered"]  # it is this prompt that is told
    assert summary["recovered_own"] > max(0, summary["recovered_own_swapped"])
    own, swapped = summary["recovered"], summary["recovered_swapped"]
    assert summary["recovered_by_gist"] == pytest.approx(own - swapped)
    low, high = summary["recovered_by_gist_interval"]
    assert 0 < low < own - swapped < high < own  # paired: the same prompts on both sides
    assert summary["saved"]["prompt_tokens"] == 3 - COUNT
    assert summary["saved"]["request_tokens"] == COUNT + 1
    assert evaluate_run(run)["kl"] == pytest.approx(summary["kl_after"], rel=1e-3)


@pytest.mark.slow
def test_a_run_says_behind_a_compressed_prompt_what_it_says_behind_its_view(trained, capsys):
    _, run, _ = trained
    file = open_model(str(run))
    params = jax.tree.map(lambda x: x.all(), file.tensors)
    assert set(params) >= {GIST, "embed"} and open_params(run).params[GIST]["embedding"].shape == (COUNT, SMALL.width)
    ids = [*b"cab", -1, -2, *b"?x"]
    wanted = Model(file.config).apply(params, data.in_rows([data.Asked(ids, [1], [1])]).student).hidden_BTD[0, 6]
    wanted = int(np.argmax(wanted @ Model(file.config).head(params).w_DV))
    said = "".join(piece for _, piece, _ in generate_texts(str(run), ["?x"], max_new_tokens=1, compress="cab"))
    assert said == data.load_tokenizer("bytes").decode([wanted])
    assert main(["generate", str(run), "--prompt", "?", "--compress", "cab", "--max-new-tokens", "2"]) == 0
    bytes_each = 2 * 2 * 1 * 8 * 4
    said = f"3 tokens are compressed to 2 places: a request's cache has {2 * bytes_each} bytes of them in the place of "
    assert f"{said}{3 * bytes_each}" in capsys.readouterr().err
    with pytest.raises(UserError, match="has a gist, which Hugging Face's formats have no place for"):
        export_run(str(run), run / "out")
    with pytest.raises(UserError, match="leave out --chat or --compress"):
        list(generate_texts(str(run), ["?"], max_new_tokens=1, compress="cab", chat=True))


def test_one_that_cannot_be_trained_is_refused(made, base):
    def seen(**views):
        return replace(made, data=replace(made.data, **views))

    for view, times in (("{{ word }}{{ prompt }}", 0), ("a{{ gist }}b{{ gist }}c", 2), ("{{ word }}{{ gist }}", 1)):
        refused(
            seen(student_view=view), f"the student's view has the gist {times} times; wanted {{{{ gist }}}} once in"
        )
    refused(seen(teacher_view="a{{ gist }}b"), "the teacher's view fails: 'gist' is undefined; mend data.teacher_view")
    with pytest.raises(UserError, match="student.gist wants two views: set data.student_view"):
        seen(teacher_view="")
    with pytest.raises(UserError, match="student.gist is 2 and student.soft_prompt.tokens is 1; wanted one of both"):
        replace(made, student=replace(made.student, soft_prompt=SoftPrompt(1), lora=Lora()))
    with pytest.raises(UserError, match="teacher.gist or teacher.soft_prompt is set, but a teacher is not trained"):
        replace(made, teacher=ModelSpec(source="x", gist=2))
    random = replace(made, student=replace(made.student, source="random", lora=Lora()))
    refused(random, "student.gist compresses what a model reads, but its source is 'random'; name a model")
    with pytest.raises(UserError, match="has no gist to compress a prompt to; train one with student.gist"):
        list(generate_texts(str(base), ["?"], max_new_tokens=1, compress="cab"))
