"""Cut models: what is kept computes what it did, what is left out is as if it were masked; and what to keep."""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.models import logits, view
from kdjax.errors import UserError
from kdjax.models import Cut, Model, ModelConfig, ModelFile, export, open_model
from kdjax.models.family import sizes_of
from kdjax.models.importance import Importance
from kdjax.models.model_file import lazy
from kdjax.models.paths import parameter_paths
from kdjax.models.prune import CHOICES, FIELDS, densified, pick, pick_heads, shape, take, top
from kdjax.models.registry import FAMILIES

GOLDEN = Path(__file__).parent.parent / "golden"
TOKENS = np.random.default_rng(3).integers(1, 128, (2, 9))
ENDS = ("attention/out", "cross/out", "mlp/down")
"""What writes into the residual stream."""
RNG = np.random.default_rng(0)
DECODERS = ["llama_tied", "gemma3", "gpt2", "gpt_neox", "mixtral", "olmo2", "phi3", "qwen2"]
ENCODERS = ["bert", "bert_classifier", "bert_model", "roberta", "distilbert", "modernbert", "t5", "t5_gated"]


@functools.cache
def opened(name):
    return open_model(str(GOLDEN / name))


def whole(file):
    return jax.tree.map(lambda tensor: tensor.all(), file.tensors)


def run(file, params=None):
    return np.asarray(logits(Model(file.config), whole(file) if params is None else params, view(file.config, TOKENS)))


def some(of, keep, layers=None):
    """Random units to keep, of each layer its own."""
    rows = [np.sort(RNG.permutation(of)[:keep]) for _ in range(layers or 1)]
    return np.array(rows if layers else rows[0])


def masked(kernel, keep_LN):
    """The kernels [L, units, ...] with those of the units that are not kept put to 0."""
    found = np.zeros_like(kernel)
    for layer, keep in enumerate(keep_LN):
        found[layer, keep] = kernel[layer, keep]
    return found


@pytest.mark.parametrize("name", DECODERS + ENCODERS)
def test_all_units_are_the_model(name):
    file = opened(name)
    sizes = sizes_of(file.config)
    same = take(file, {letter: np.arange(sizes[letter]) for letter in FIELDS})
    assert same.config == file.config
    jax.tree.map(np.testing.assert_array_equal, whole(same), whole(file))


@pytest.mark.parametrize("name", ["llama_untied", "gpt2", "bert", "bert_model", "modernbert"])
def test_neurons_left_out_are_neurons_masked(name):
    file = opened(name)
    keep_LF, params = some(file.config.mlp_width, 20, file.config.layers), whole(file)
    params["layers"]["mlp"]["down"]["kernel"] = masked(params["layers"]["mlp"]["down"]["kernel"], keep_LF)
    cut = take(file, {"F": keep_LF})
    assert cut.config == replace(file.config, mlp_width=20)
    np.testing.assert_allclose(run(cut), run(file, params), atol=2e-6)


@pytest.mark.parametrize(
    ("name", "kv_heads", "heads"),
    [(name, kv_heads, 2) for name in ("llama_untied", "gemma2") for kv_heads in (1, 2)]
    + [(name, 2, 2) for name in ("bert", "bert_classifier", "roberta", "distilbert", "modernbert")],
)
def test_heads_left_out_are_heads_masked(name, kv_heads, heads):
    file = opened(name)
    config = file.config
    group_LG, head_LH = pick_heads(RNG.random((config.layers, config.heads)), config.kv_heads, kv_heads, heads)
    cut, params = take(file, {"G": group_LG, "H": head_LH}), whole(file)
    params["layers"]["attention"]["out"]["kernel"] = masked(params["layers"]["attention"]["out"]["kernel"], head_LH)
    assert cut.config == replace(config, kv_heads=kv_heads, heads=heads)
    np.testing.assert_allclose(run(cut), run(file, params), atol=1e-5)


@pytest.mark.parametrize("name", ["llama_untied", "bert", "bert_model", "modernbert", "t5"])
def test_layers_left_out_are_layers_that_add_nothing(name):
    """Where sums are normalised, such a layer still does that; a stream that is normalised stays as it is."""
    file, params = opened(name), whole(opened(name))
    stacks = {"L": params["layers"]} | ({"M": params["encoder"]["layers"]} if file.config.encoder_layers else {})
    for layers in stacks.values():
        for branch, end in (path.split("/") for path in ENDS):
            for leaf in layers.get(branch, {}).get(end, {}).values():
                leaf[-1] = 0
        for path in (name for name in layers if name.endswith("_sum_norm")):
            layers[path]["scale"][-2:], layers[path]["bias"][-2:] = 1, 0
    idle = ModelFile(file.config, jax.tree.map(lazy, params), file.source, None)
    cut = take(idle, dict.fromkeys(stacks, np.arange(2)))
    assert cut.config.layers == 2 and cut.config.encoder_layers == 2 * (name == "t5")
    np.testing.assert_allclose(run(cut), run(idle), atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "t5_gated"])
def test_what_is_left_out_of_both_stacks_is_masked(name):
    file, params = opened(name), whole(opened(name))
    heads = {"": some(4, 2), "encoder/": some(4, 3)[:2]}
    picks = {f"{stack}{letter}": index for stack, index in heads.items() for letter in "GH"}
    picks |= {"F": some(48, 20, 3), "encoder/F": some(48, 20, 3)}
    for stack, layers in (("", params["layers"]), ("encoder/", params["encoder"]["layers"])):
        down = layers["mlp"]["down"]
        down["kernel"] = masked(down["kernel"], picks[f"{stack}F"])
        for out in (layers[branch]["out"] for branch in ("attention", "cross") if branch in layers):
            out["kernel"] = masked(out["kernel"], [heads[stack]] * 3)
    cut = take(file, picks)
    assert cut.config == replace(file.config, heads=2, kv_heads=2, mlp_width=20)
    np.testing.assert_allclose(run(cut), run(file, params), atol=5e-6)


@pytest.mark.parametrize("name", ["bert", "bert_classifier"])
def test_before_a_head_channels_are_those_of_the_width(name):
    file, keep_D = opened(name), some(32, 24)
    cut, head = take(file, {"D": keep_D}), "classifier" if file.config.labels else "head"
    kernels = [parameter_paths(whole(model))[f"{head}_transform/kernel"] for model in (cut, file)]
    np.testing.assert_array_equal(kernels[0], kernels[1][np.ix_(keep_D, keep_D)])
    assert run(cut).shape == run(file).shape


@pytest.mark.parametrize("name", ["llama_untied", "gemma2", "olmo2", "t5", "t5_gated"])
def test_channels_that_are_zero_change_nothing_but_the_means_of_norms(name):
    """Of a norm over d of D channels, the others 0, the output is √(d/D) of what it was."""
    file, keep_D = opened(name), some(32, 24)
    gone, paths = np.setdiff1d(np.arange(32), keep_D), parameter_paths(whole(file))
    for path in paths:
        if path == "embed/embedding" or path.rpartition("/")[0].endswith(ENDS):
            paths[path][..., gone] = 0
    tensors = jax.tree_util.tree_map_with_path(lambda path, _: lazy(paths["/".join(k.key for k in path)]), file.tensors)
    zeroed = ModelFile(replace(file.config, norm_eps=1e-12), tensors, file.source, None)
    cut = take(zeroed, {"D": keep_D})
    params = whole(cut)
    for path, leaf in parameter_paths(params).items():
        if path.endswith("norm/scale") and "/q_" not in path and "/k_" not in path:
            leaf *= np.float32((32 / 24) ** 0.5)
    assert cut.config.width == 24
    np.testing.assert_allclose(run(cut, params), run(zeroed), atol=1e-5)


@pytest.mark.parametrize("name", ["llama_untied"])
def test_logits_of_kept_tokens_are_the_teachers(name):
    file, keep_V = opened(name), np.union1d(TOKENS, [0, 127])
    cut = take(file, {"V": keep_V})
    again = np.asarray(logits(Model(cut.config), whole(cut), view(cut.config, np.searchsorted(keep_V, TOKENS))))
    np.testing.assert_allclose(again, run(file)[..., keep_V], atol=2e-6)


def test_one_expert_is_a_mixture_of_its_copies():
    file, chosen = opened("mixtral"), (2, 0, 3)
    mixture = ModelFile(replace(file.config, normalise_picks=True), file.tensors, file.source, None)
    params = whole(file)
    for kernels in params["layers"]["experts"].values():
        of_layers = zip(kernels["kernel"], chosen, strict=True)
        kernels["kernel"] = np.stack([np.stack([kernel[expert]] * len(kernel)) for kernel, expert in of_layers])
    np.testing.assert_allclose(run(densified(file, chosen)), run(mixture, params), atol=2e-6)


def test_any_part_of_a_cut_model_reads_as_that_part_of_the_whole():
    file = take(opened("llama_tied"), {"F": some(48, 9, 3), "D": some(32, 8), "V": some(128, 50)})
    for path, tensor in parameter_paths(file.tensors).items():
        everything = tensor.all()
        assert everything.shape == tensor.shape, path
        part = tuple(slice(size // 3, max(size // 3 + 1, size - 1)) for size in tensor.shape)
        np.testing.assert_array_equal(tensor.read(part), everything[part])


@pytest.mark.parametrize("name", ["llama_tied", "gemma3", "mixtral", "gpt2", "phi3"])
def test_a_cut_model_is_exported_and_read_back_the_same(name, tmp_path):
    file = opened(name)
    sizes = sizes_of(file.config)
    picks = {"V": np.arange(5, 100)} | ({} if file.config.experts else {"F": some(sizes["F"], 12, 2)})
    if name != "gpt2":
        picks |= {"D": some(32, 16)}
        picks["G"], picks["H"] = pick_heads(RNG.random((2, 4)), 2, 1, 2)
    cut = take(file, {"L": np.array((0, 2)), **picks})
    again = open_model(str(export(cut.config, cut.tensors, tmp_path / "out", None)))
    assert again.config == cut.config
    jax.tree.map(np.testing.assert_array_equal, whole(again), whole(cut))


def test_choices_of_layers():
    score_L = np.array([0.9, 0.1, 0.5, 0.1, 0.2, 0.8])
    chosen = {name: [choose(score_L, n) for n in (1, 2, 3, 6)] for name, choose in CHOICES.items()}
    assert chosen["even"] == [(0,), (0, 5), (0, 2, 5), (0, 1, 2, 3, 4, 5)]
    assert chosen["ends"] == [(0,), (0, 5), (0, 1, 5), (0, 1, 2, 3, 4, 5)]
    assert chosen["importance"] == [(0,), (0, 5), (0, 2, 5), (0, 1, 2, 3, 4, 5)]


def test_the_best_are_kept_in_order_and_of_equals_the_first():
    assert top(np.array([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]]), 2).tolist() == [[1, 3], [0, 1]]


def test_groups_go_by_the_sum_of_their_heads_and_keep_their_best():
    score_LH = np.array([[5.0, 1.0, 0.0, 1.0, 0.0, 9.0]])
    group_LG, head_LH = pick_heads(score_LH, 3, 2, 2)
    assert (group_LG.tolist(), head_LH.tolist()) == ([[0, 2]], [[0, 5]])
    group_LG, head_LH = pick_heads(score_LH, 3, 1, 2)
    assert (group_LG.tolist(), head_LH.tolist()) == ([[2]], [[4, 5]])
    group_G, head_H = pick_heads(score_LH[0], 3, 2, 2)
    assert (group_G.tolist(), head_H.tolist()) == ([0, 2], [0, 5])


def test_units_are_those_of_the_layers_that_are_kept():
    config = ModelConfig(layers=3, heads=2, kv_heads=2, mlp_width=3)
    neuron_LF = np.array([[3.0, 2.0, 1.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    scores = Importance(np.array([1.0, 0.0, 2.0]), np.eye(3, 2), neuron_LF, np.arange(64.0), None)
    picks = pick(config, Cut(layers=2, choose="importance", mlp=1, heads=1, width=2), scores)
    assert picks["L"].tolist() == [0, 2] and picks["D"].tolist() == [62, 63]
    assert picks["F"].tolist() == [[0], [2]] and picks["G"].tolist() == picks["H"].tolist() == [[0], [0]]


def test_both_stacks_have_their_own_units_and_learned_positions_their_heads():
    config = replace(opened("t5").config, layers=3, encoder_layers=2, heads=2, kv_heads=2, mlp_width=3)
    neuron_LF, head_MH = (
        np.array([[3.0, 2.0, 1.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]),
        np.array([[0.0, 5.0], [4.0, 0.0]]),
    )
    encoder = np.array([0.0, 1.0]), head_MH, np.array([[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    scores = Importance(
        np.array([1.0, 0.0, 2.0]), np.array([[3.0, 0], [9, 0], [0, 2]]), neuron_LF, np.arange(32.0), None, *encoder
    )
    picks = pick(config, Cut(layers=2, encoder_layers=1, choose="importance", mlp=1, heads=1), scores)
    wanted = {"L": [0, 2], "M": [1], "F": [[0], [2]], "encoder/F": [[2]]}
    wanted |= {"G": [0], "H": [0], "encoder/G": [0], "encoder/H": [0]}
    assert {letter: index.tolist() for letter, index in picks.items()} == wanted
    whole_encoder = pick(config, Cut(layers=1, heads=1), scores)
    assert whole_encoder["M"].tolist() == [0, 1] and whole_encoder["encoder/H"].tolist() == [1]


def test_a_layer_that_no_other_can_stand_in_for_is_kept():
    config = opened("modernbert").config
    scores = Importance(np.array([0.0, 1.0, 2.0]), np.ones((3, 4)), None, np.ones(32), None)
    assert pick(config, Cut(layers=2, choose="importance"), scores)["L"].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("name", "cut", "said"),
    [
        ("bert", {"encoder_layers": 1}, "encoder_layers is 1, but the teacher has no encoder beside a decoder"),
        ("bert", {"heads": 2}, "no head_width=8; .* so cut both: 2 heads with width 16"),
        ("bert", {"width": 16}, "no head_width=8; .* so cut both: 4 heads with width 32"),
        ("modernbert", {"keep_layers": (1, 2)}, r"no unnormed=\(\); .* keep layer 0 first"),
        ("t5", {"vocab": 100}, "vocab is for models of one stack"),
        ("t5", {"encoder_layers": 4}, "encoder_layers is 4; wanted from 1 to the teacher's 3"),
        ("llama_tied", {"layers": 4}, "layers is 4; wanted from 1 to the teacher's 3"),
        ("llama_tied", {"mlp": 0}, "mlp is 0; wanted from 1"),
        ("llama_tied", {"vocab": 129}, "vocab is 129"),
        ("llama_tied", {"keep_layers": (0, 3)}, "cannot keep layers"),
        ("llama_tied", {"heads": 3}, "3 heads cannot be those of 2 groups"),
        ("llama_tied", {"heads": 4, "kv_heads": 1}, "4 heads cannot be those of 1 groups"),
        ("llama_tied", {"dense": True}, "dense is for families with experts"),
        ("mixtral", {"mlp": 8}, "add --dense"),
        ("gpt2", {"heads": 2}, "Hugging Face's gpt2 has no head_width=8"),
        ("gpt2", {"width": 30}, "n_embd 30 does not divide by n_head 4"),
    ],
)
def test_what_cannot_be_cut_is_said_in_a_line(name, cut, said):
    with pytest.raises(UserError, match=said) as caught:
        shape(opened(name), Cut(**cut))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ({}, "nothing is cut"),
        ({"choose": "ends"}, "nothing is cut"),
        ({"layers": 2, "choose": "best"}, "choose is 'best'"),
        ({"layers": 2, "keep_layers": (0,)}, "give one of them"),
    ],
)
def test_a_cut_that_says_too_little_or_too_much_is_refused(cut, said):
    with pytest.raises(UserError, match=said):
        Cut(**cut)


def test_the_shape_is_known_beforehand():
    config = shape(opened("mixtral"), Cut(layers=2, mlp=16, kv_heads=1, width=16, vocab=64, dense=True))
    assert (config.family, config.layers, config.mlp_width, config.width) == ("mistral", 2, 16, 16)
    assert (config.kv_heads, config.heads, config.vocab_size, config.experts) == (1, 2, 64, 0)


def test_every_family_with_experts_has_a_dense_one():
    for name, family in FAMILIES.items():
        if any("experts" in path for path in family.weights):
            config = opened(name).config
            assert densified(opened(name)).config.family in FAMILIES, config
