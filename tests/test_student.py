"""Students as a user has them cut: what OUT holds, that it loads, trains and generates; and what is refused at once."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from test_kinds import MODELS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kdjax.cli import main
from kdjax.data import DataConfig
from kdjax.errors import UserError
from kdjax.models import Cut, Model, ModelConfig, export, open_model
from kdjax.models.model_file import layer_of
from kdjax.models.prune import take
from kdjax.student import NAMES, _loader, make_student, suited

CONFIG = ModelConfig(
    vocab_size=300, width=16, layers=3, heads=4, kv_heads=2, head_width=8, mlp_width=32, max_positions=64
)
MIXTURE = ModelConfig(**vars(CONFIG) | {"family": "mixtral", "experts": 3, "layers": 2})
KINDS = {
    task: replace(model, vocab_size=300, layers=3, encoder_layers=3 * (task == "seq2seq"), max_positions=64)
    for task, model in MODELS.items()
}
CUTS = {
    "masked_lm": ("--layers", "2", "--choose", "importance", "--mlp", "20"),
    "classification": ("--heads", "1", "--width", "8", "--mlp", "20"),
    "embedding": ("--keep-layers", "0", "2", "--heads", "1", "--width", "8"),
    "seq2seq": ("--layers", "1", "--encoder-layers", "2", "--mlp", "20", "--heads", "1", "--width", "12"),
}
"""Task -> what the command cuts of a model for it."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("home")
    tiny_run.write_recipe(directory)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<mask>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([(directory / "text.txt").read_text()], trainer)
    backend.save(str(directory / "tokenizer.json"))
    rng = np.random.default_rng(0)
    lines = rng.choice(["up", "down", "left", "right"], (200, 12))
    rows = (json.dumps({"text": " ".join(line), "label": n % 4}) + "\n" for n, line in enumerate(lines))
    (directory / "rows.jsonl").write_text("".join(rows))
    for name, config in {"teacher": CONFIG, "mixture": MIXTURE, **KINDS}.items():
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


SLOW = ("masked_lm", "classification")


@pytest.fixture(scope="module", params=[pytest.param(t, marks=[pytest.mark.slow] * (t in SLOW)) for t in CUTS])
def kind(request, home):
    """The task of a model, the student that the command cut out of it, the report, and what was printed."""
    out, source = home / f"{request.param}_student", f"jsonl:{home / 'rows.jsonl'}"
    flags = ("--sources", source, "--sequence-length", "32", "--rows", "8")
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["student", str(home / request.param), str(out), *CUTS[request.param], *flags]) == 0
    return request.param, out, json.loads((out / "student.json").read_text()), printed.getvalue()


def whole(file):
    return jax.tree.map(lambda tensor: tensor.all(), file.tensors)


def test_of_every_kind_the_student_is_what_the_report_says(home, kind):
    task, out, report, printed = kind
    letters = {name: letter for letter, name in NAMES.items()}
    picks = {letters[name]: np.array(index) for name, index in report["kept"].items()}
    cut, file = take(open_model(str(home / task)), picks), open_model(str(out))
    assert file.config == cut.config and file.config.task == task
    jax.tree.map(np.testing.assert_array_equal, whole(file), whole(cut))
    assert ("encoder layers kept: " in printed) == (task == "seq2seq")


def test_every_kind_is_measured_by_what_it_gives(home, kind):
    task, out, report, printed = kind
    figure, other = ("features", "kl") if task == "embedding" else ("kl", "features")
    for model in (report["models"][name] for name in ("student", "random student")):
        assert model[figure] > 0 and model["tokens"] > 0 and other not in model
    assert ("KL to teacher (nats)" in printed, "1 − cosine to teacher" in printed) == (figure == "kl", figure != "kl")
    if task == "masked_lm":  # of the tokens of 8 rows those that are hidden
        assert report["models"]["student"]["tokens"] < 8 * 32 * 0.3
    if task == "embedding":
        cosine = mean_cosine(home, open_model(str(home / task)), open_model(str(out)), report["kept"]["channels"])
        assert report["models"]["student"]["features"] == pytest.approx(1 - cosine, rel=1e-4)


def mean_cosine(home, teacher, student, channels):
    """The mean over held-out tokens, a student's channels being where the teacher has them."""
    files = teacher, student
    rows = DataConfig(sources=(f"jsonl:{home / 'rows.jsonl'}",), sequence_length=32)
    cosines = []
    for batch in _loader(files[0], suited(rows, files[0].config, 8), 8).evaluation(8):
        teacher, student = (Model(file.config).apply(whole(file), batch.student).hidden_BTD for file in files)
        wide = np.zeros_like(teacher)
        wide[..., channels] = student
        norms = np.linalg.norm(teacher, axis=-1) * np.linalg.norm(wide, axis=-1)
        cosines.append(((teacher * wide).sum(-1) / norms)[batch.student.segment_BT > 0])
    return np.concatenate(cosines).mean()


@pytest.mark.slow
@pytest.mark.parametrize("task", KINDS)
def test_a_student_that_lacks_nothing_is_its_teacher(home, task, tmp_path):
    rows = DataConfig(sources=(f"jsonl:{home / 'rows.jsonl'}",), sequence_length=32)
    report = make_student(str(home / task), tmp_path / "out", Cut(layers=3), rows, 8)
    assert report["models"]["student"]["features" if task == "embedding" else "kl"] < 1e-6


@pytest.mark.slow
def test_a_masked_language_model_may_have_fewer_tokens(home, tmp_path):
    report = cut(home, tmp_path / "out", "masked_lm", vocab=270)
    file = open_model(str(tmp_path / "out"))
    assert (file.config.vocab_size, file.config.task) == (270, "masked_lm") and file.tokenizer is not None
    assert "<mask>" in Tokenizer.from_file(str(file.tokenizer)).get_vocab()
    assert report["models"]["student"]["kl"] == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_is_refused_before_the_slow_work(home, tmp_path):
    with pytest.raises(UserError, match="not an empty directory"):
        cut(home, home / "teacher", layers=1)
    with pytest.raises(UserError, match="layers is 9; wanted from 1 to the teacher's 3"):
        cut(home, tmp_path / "out", layers=9)
    with pytest.raises(UserError, match="has no tokenizer.json"):
        cut(Path(__file__).parent / "golden", tmp_path / "out", "llama_tied", layers=1)
    with pytest.raises(UserError, match="rows have 128 tokens; the teacher was made for 64 positions at most"):
        make_student(
            str(home / "teacher"), tmp_path / "out", Cut(layers=1), replace(text(home), sequence_length=128), 8
        )
    with pytest.raises(UserError, match="has no label, which classification wants|'label' is None"):
        cut(home, tmp_path / "out", "classification", layers=1)
    pieces = home / "pieces"
    config, params = open_model(str(home / "embedding")).config, whole(open_model(str(home / "embedding")))
    words = Tokenizer(models.WordPiece({"<|endoftext|>": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.add_special_tokens(["<|endoftext|>"])
    words.save(str(tmp_path / "tokenizer.json"))
    export(config, params, pieces, tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="vocab cuts byte-pair tokenizers; this one is WordPiece: leave --vocab out"):
        cut(home, tmp_path / "out", "pieces", vocab=270)
    assert not (tmp_path / "out").exists()
