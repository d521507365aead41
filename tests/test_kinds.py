"""Every kind of model through the whole of a run: data, teacher, step, evaluation, checkpoint, export."""

import json
from dataclasses import replace

import numpy as np
import pytest

from kdjax.build import build
from kdjax.config import Config
from kdjax.data import DataConfig
from kdjax.errors import UserError
from kdjax.jobs import export_run, generate_texts
from kdjax.losses import Feature, ObjectiveConfig
from kdjax.models import ModelConfig, ModelSpec, open_model
from kdjax.models.model_file import select_encoder_layers
from kdjax.optim import OptimConfig
from kdjax.train import train

SMALL = ModelConfig(vocab_size=264, width=16, layers=2, heads=2, kv_heads=2, head_width=8, mlp_width=32)
BERT = replace(
    SMALL, family="bert", norm="layer", norms="sum", embedding_norm=True, causal=False, activation="gelu",
    gated_mlp=False, positions="learned", qkv_bias=True, out_bias=True, mlp_bias=True, token_types=2,
)  # fmt: skip
MODELS = {
    "masked_lm": replace(BERT, head_transform="gelu", head_norm=True, head_bias=True),
    "classification": replace(BERT, labels=4, tie_head=False, head_transform="tanh", head_bias=True),
    "embedding": BERT,
    "seq2seq": replace(
        SMALL, family="t5", encoder_layers=2, positions="relative", attention_scale=1.0, activation="gelu_tanh",
        tie_head=False, start_token=256,
    ),
}  # fmt: skip


def config_of(task, rows, **changes):
    model = MODELS[task]
    objective = ObjectiveConfig(alpha=0.0)
    if task == "embedding":
        objective = ObjectiveConfig(logits=False, features=(Feature("hidden_mse"), Feature("relation_qq")))
    packing = "first_fit" if task in ("classification", "seq2seq") else "concat"
    return replace(
        Config(
            name=task,
            teacher=ModelSpec(architecture=replace(model, layers=3)),
            student=ModelSpec(architecture=model),
            data=DataConfig(
                sources=(f"jsonl:{rows}",),
                tokenizer="bytes",
                packing=packing,
                sequence_length=32,
                eval_fraction=0.2,
                dedupe_ngram=0,
            ),
            objective=objective,
            optim=OptimConfig(learning_rate=1e-2),
            steps=6,
            batch_size=8,
        ),
        **changes,
    )


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    words = np.random.default_rng(0).choice(["up", "down", "left", "right"], (80, 5))
    path.write_text(
        "".join(json.dumps({"text": " ".join(line), "label": n % 4}) + "\n" for n, line in enumerate(words))
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize("task", MODELS)
def test_every_kind_trains_is_measured_and_exported(task, rows, tmp_path):
    summary = train(config_of(task, rows), tmp_path / "run")
    figure = "features" if task == "embedding" else "kl"
    assert 0 < summary[f"{figure}_after"] < summary[f"{figure}_before"]
    assert ("ce_after" in summary) == (task != "embedding")
    export_run(str(tmp_path / "run"), tmp_path / "out")
    again, run = open_model(str(tmp_path / "out")), open_model(str(tmp_path / "run"))
    assert again.config == run.config and again.sha256() == run.sha256()
    if task == "seq2seq":
        (*_, (number, _, is_over)) = generate_texts(str(tmp_path / "out"), ["up"], max_new_tokens=3)
        assert (number, is_over) == (0, True)
    else:
        with pytest.raises(UserError, match="an encoder, which continues no text"):
            list(generate_texts(str(tmp_path / "out"), ["up"], max_new_tokens=3))


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("masked_lm", {"teacher": ModelSpec(architecture=SMALL)}, "the teacher is made for causal_lm but the data is"),
        ("masked_lm", {"student": ModelSpec(architecture=SMALL)}, "the teacher is made for masked_lm but the data is"),
        ("masked_lm", {"prompt": "A"}, "prompt is 'A', but an encoder continues no text"),
        (
            "embedding",
            {"objective": ObjectiveConfig()},
            "an encoder without a head has no logits",
        ),
        (
            "classification",
            {"teacher": ModelSpec(architecture=replace(MODELS["classification"], labels=3))},
            "the student tells 4 classes apart but the teacher 3",
        ),
    ],
)
def test_models_that_do_not_go_together_are_refused(task, changes, message, rows):
    with pytest.raises(UserError, match=message):
        build(config_of(task, rows, **changes))


def test_logits_may_be_off_only_beside_features():
    with pytest.raises(UserError, match="objective.logits is off and there are no features"):
        ObjectiveConfig(logits=False)


@pytest.mark.slow
def test_an_encoder_keeps_the_layers_that_are_named(rows, tmp_path):
    train(replace(config_of("seq2seq", rows), steps=1), tmp_path / "run")
    whole = open_model(str(tmp_path / "run"))
    cut = select_encoder_layers(whole, (1,))
    assert cut.config.encoder_layers == 1 and cut.config.layers == whole.config.layers
    kernels = [file.tensors["encoder"]["layers"]["attention"]["q"]["kernel"].all() for file in (cut, whole)]
    np.testing.assert_array_equal(kernels[0], kernels[1][1:])
    spec = ModelSpec(source="teacher", keep_layers=(0,), keep_encoder_layers=(1,))
    job = build(config_of("seq2seq", rows, teacher=ModelSpec(source=str(tmp_path / "run")), student=spec))
    assert (job.student.model.config.layers, job.student.model.config.encoder_layers) == (1, 1)
    with pytest.raises(UserError, match="cannot keep layers .* wanted at least one, each from 0 to 1"):
        select_encoder_layers(whole, (2,))
    with pytest.raises(UserError, match="it has no encoder beside a decoder"):
        select_encoder_layers(replace(whole, config=SMALL), (0,))


def test_relations_of_an_encoder_are_with_all_tokens(rows):
    job = build(config_of("embedding", rows))
    assert not any(feature.causal for feature in job.recipe.objective.features)
