"""Students as a user has them cut: what OUT holds, that it loads, trains and generates; and what is refused at once."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kdjax.cli import main
from kdjax.data import DataConfig
from kdjax.errors import UserError
from kdjax.models import Cut, Model, ModelConfig, export, open_model
from kdjax.models.model_file import layer_of
from kdjax.student import make_student

CONFIG = ModelConfig(
    vocab_size=300, width=16, layers=3, heads=4, kv_heads=2, head_width=8, mlp_width=32, max_positions=64
)
MIXTURE = ModelConfig(**vars(CONFIG) | {"family": "mixtral", "experts": 3, "layers": 2})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("home")
    tiny_run.write_recipe(directory)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([(directory / "text.txt").read_text()], trainer)
    backend.save(str(directory / "tokenizer.json"))
    rng = np.random.default_rng(0)
    for name, config in (("teacher", CONFIG), ("mixture", MIXTURE)):
        shapes = jax.eval_shape(Model(config).init, jax.random.key(0))
        params = jax.tree.map(lambda x: rng.normal(0, 0.16, x.shape).astype(np.float32), shapes)
        export(config, params, directory / name, directory / "tokenizer.json")
    return directory


def text(home):
    return DataConfig(sources=(f"text:{home / 'text.txt'}",), sequence_length=32)


def cut(home, out, teacher="teacher", **what):
    return make_student(str(home / teacher), out, Cut(**what), text(home), rows=8)


@pytest.fixture(scope="module")
def student(home):
    """What the command wrote, the report in it, and what it printed."""
    out, flags = home / "student", ("--sources", f"text:{home / 'text.txt'}", "--sequence-length", "32", "--rows", "8")
    what = ("--layers", "2", "--choose", "importance", "--mlp", "20", "--kv-heads", "1")
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["student", str(home / "teacher"), str(out), *what, *flags]) == 0
    return out, json.loads((out / "student.json").read_text()), printed.getvalue()


def test_the_student_has_the_units_that_the_report_names(home, student):
    out, report, _ = student
    kept, teacher, file = report["kept"], open_model(str(home / "teacher")), open_model(str(out))
    assert (file.config.layers, file.config.mlp_width, file.config.heads, file.config.kv_heads) == (2, 20, 2, 1)
    for place, layer in enumerate(kept["layers"]):
        down_FD = layer_of(teacher.tensors["layers"]["mlp"]["down"]["kernel"], layer).all()[kept["neurons"][place]]
        np.testing.assert_array_equal(layer_of(file.tensors["layers"]["mlp"]["down"]["kernel"], place).all(), down_FD)
        q_DHK = layer_of(teacher.tensors["layers"]["attention"]["q"]["kernel"], layer).all()[:, kept["heads"][place]]
        np.testing.assert_array_equal(layer_of(file.tensors["layers"]["attention"]["q"]["kernel"], place).all(), q_DHK)
    assert file.tokenizer is not None and file.tokenizer.read_bytes() == (home / "tokenizer.json").read_bytes()


def test_the_report_has_sizes_scores_and_figures(student):
    _, report, printed = student
    models = report["models"]
    shown = models["student"], models["random student"]
    assert models["teacher"]["parameters"] > shown[0]["parameters"] == shown[1]["parameters"]
    assert all(model["bytes"] == 4 * model["parameters"] for model in models.values())
    assert all(model["kl"] > 0 and model["perplexity"] > 1 for model in shown) and shown[0]["kl"] != shown[1]["kl"]
    assert models["teacher"]["tokens"] <= 8 * 32 and models["teacher"]["perplexity"] > 1
    scores = report["importance"]
    assert len(scores["layer_L"]) == 3 and np.shape(scores["neuron_LF"]) == (3, 32) and scores["expert_LE"] is None
    assert report["kept"]["layers"] == sorted(np.argsort(scores["layer_L"])[-2:].tolist())
    for words in ("teacher", "random student", "KL to teacher (nats)", "layers kept: ", "student.json"):
        assert words in printed


@pytest.mark.slow
def test_a_student_that_lacks_almost_nothing_is_almost_its_teacher(home, tmp_path):
    report = make_student(str(home / "teacher"), tmp_path / "out", Cut(mlp=31), text(home), 8, "bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert report["models"]["student"]["kl"] < 0.2 * report["models"]["random student"]["kl"]


@pytest.mark.slow
def test_of_a_mixture_the_most_used_expert_is_kept(home, tmp_path):
    report = cut(home, tmp_path / "out", "mixture", dense=True, mlp=16)
    file, teacher = open_model(str(tmp_path / "out")), open_model(str(home / "mixture"))
    assert (file.config.family, file.config.experts, file.config.mlp_width) == ("mistral", 0, 16)
    most = np.argmax(report["importance"]["expert_LE"], axis=1)
    for layer, expert in enumerate(most):
        whole_FD = layer_of(layer_of(teacher.tensors["layers"]["experts"]["down"]["kernel"], layer), expert).all()
        own_FD = layer_of(file.tensors["layers"]["mlp"]["down"]["kernel"], layer).all()
        np.testing.assert_array_equal(own_FD, whole_FD[report["kept"]["neurons"][layer]])


@pytest.fixture(scope="module")
def smaller(home):
    """The teacher with fewer tokens, and a student cut out of that."""
    teacher = cut(home, home / "smaller", vocab=270)
    return teacher, cut(home, home / "of_smaller", "smaller", layers=1)


@pytest.mark.slow
def test_a_teacher_of_fewer_tokens_is_itself_but_for_these(home, smaller):
    small, full = open_model(str(home / "smaller")), open_model(str(home / "teacher"))
    assert small.config.vocab_size == 270 and small.tokenizer is not None
    ours, theirs = (Tokenizer.from_file(str(file.tokenizer)) for file in (small, full))
    embeddings = [file.tensors["embed"]["embedding"].all() for file in (small, full)]
    old_ids = [theirs.token_to_id(ours.id_to_token(new)) for new in range(270)]
    np.testing.assert_array_equal(embeddings[0], embeddings[1][old_ids])
    assert smaller[0]["models"]["student"]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_it_is_trained_and_generates(home, smaller, monkeypatch):
    monkeypatch.chdir(home)
    flags = ("--teacher.source", "smaller", "--student.source", "of_smaller", "--data.tokenizer=", "--steps", "3")
    with redirect_stdout(io.StringIO()) as out:
        assert main(["train", "tiny.py", "--run-dir", "run", *flags, "--checkpoint.every", "3"]) == 0
        assert main(["generate", "of_smaller", "--prompt", "the", "--max-new-tokens", "4"]) == 0
    assert "KL to teacher" in out.getvalue()


def test_what_cannot_be_is_refused_before_the_slow_work(home, tmp_path):
    with pytest.raises(UserError, match="not an empty directory"):
        cut(home, home / "teacher", layers=1)
    with pytest.raises(UserError, match="layers is 9; wanted from 1 to the teacher's 3"):
        cut(home, tmp_path / "out", layers=9)
    with pytest.raises(UserError, match="has no tokenizer.json"):
        cut(Path(__file__).parent / "golden", tmp_path / "out", "llama_tied", layers=1)
    assert not (tmp_path / "out").exists()
