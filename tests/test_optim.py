"""Optimisers: a stack's update is each layer's own (trap 25), rules go by name, schedules have their closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdjax.errors import UserError
from kdjax.optim import OPTIMIZERS, SCHEDULES, OptimConfig, optimizer, schedule


def is_shape(node):
    return isinstance(node, tuple)


DEPTH, STEPS = 3, 3
# Widths of 128 and more, since Adafactor factors only from there on; k's bias is one that a rule by ndim would factor.
LAYER = {
    "attention_norm": {"scale": (128,), "bias": (128,)},
    "attention": {
        "q": {"kernel": (128, 4, 40), "bias": (4, 40), "lora_a": (128, 6), "lora_b": (6, 4, 40)},
        "k": {"kernel": (128, 2, 40), "bias": (128, 130)},
        "out": {"kernel": (4, 40, 128), "bias": (128,), "lora_a": (4, 40, 6), "lora_b": (6, 128)},
    },
    "mlp_norm": {"scale": (128,)},
    "mlp": {"up": {"kernel": (128, 152)}},
    "experts": {"up": {"kernel": (2, 128, 136)}},
}
SHAPES = {
    "student": {
        "embed": {"embedding": (140, 128)},
        "positions": {"embedding": (130, 128)},
        "layers": jax.tree.map(lambda shape: (DEPTH, *shape), LAYER, is_leaf=is_shape),
        "final_norm": {"scale": (128,), "bias": (128,)},
        "head": {"kernel": (128, 140)},
    },
    "projections": {"0": {"kernel": (128, 144)}, "student": {"layers": {"up": {"kernel": (2, 128, 160)}}}},
}


def random_tree(seed, shapes=SHAPES, scale=1.0):
    """Return standard normal leaves; layers of a stack differ in size, so that sharing across them shows."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        leaf = rng.standard_normal(shape) * scale
        if "/layers/" in "/" + jax.tree_util.keystr(path, simple=True, separator="/"):
            leaf *= 4.0 ** np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        return leaf.astype(np.float32)

    return jax.tree.map_with_path(draw, shapes, is_leaf=is_shape)


def is_matrix(name):
    return any(word in name for word in ("kernel", "embedding", "lora"))


def unstack(tree):
    """Return {name or name#layer: the natural matrix or vector}: what a model without stacks would have."""
    flat = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
        leaf = np.asarray(leaf)
        layers = {f"{name}#{i}": layer for i, layer in enumerate(leaf)} if "/layers/" in name else {name: leaf}
        if "/experts/" in name:
            layers = {f"{key}#{i}": expert for key, layer in layers.items() for i, expert in enumerate(layer)}
        for key, layer in layers.items():
            if "out/kernel" in name or "out/lora_a" in name:
                flat[key] = layer.reshape(-1, layer.shape[-1])
            elif is_matrix(name):
                flat[key] = layer.reshape(layer.shape[0], -1)
            else:
                flat[key] = layer.reshape(-1)
    return flat


def plain_muon(flat, config):
    labels = {k: "muon" if is_matrix(k) and "head" not in k and "embedding" not in k else "adam" for k in flat}
    adam = optax.adam(config.learning_rate, config.b1, config.b2, config.eps)
    return optax.partition({"muon": optax.contrib.muon(config.learning_rate, consistent_rms=0.2), "adam": adam}, labels)


PLAIN = {
    "adamw": lambda _, c: optax.adam(c.learning_rate, c.b1, c.b2, c.eps),
    "adafactor": lambda _, c: optax.adafactor(c.learning_rate, multiply_by_parameter_scale=False),
    "lion": lambda _, c: optax.lion(c.learning_rate, c.b1, c.b2, weight_decay=0.0),
    "muon": plain_muon,
}


def constant(name, **fields):
    return OptimConfig(name=name, schedule="constant", **{"learning_rate": 0.01, "clip_norm": 0.0, **fields})


def run(transformation, params, gradients):
    update = jax.jit(transformation.update)
    state = jax.jit(transformation.init)(params)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_update_is_the_per_layer_update(name):
    config = constant(name, weight_decay=0.1)
    params = random_tree(0)
    gradients = [random_tree(seed, scale=1e-2) for seed in range(1, 1 + STEPS)]
    got, _ = run(optimizer(config, STEPS, params), params, gradients)

    flat = unstack(params)
    plain = PLAIN[name](flat, config)
    update = jax.jit(plain.update)
    state = jax.jit(plain.init)(flat)
    for gradient in gradients:
        updates, state = update(unstack(gradient), state, flat)
        decays = {k: 0.01 * 0.1 if is_matrix(k) else 0.0 for k in flat}
        flat = {k: p + np.asarray(updates[k]) - decays[k] * p for k, p in flat.items()}
    for key, want in flat.items():
        np.testing.assert_allclose(unstack(got)[key], want, atol=2e-6 * np.abs(want).max(), err_msg=key)


IN_BFLOAT16 = {
    "adamw": lambda c: optax.adam(c.learning_rate, c.b1, c.b2, c.eps, mu_dtype="bfloat16"),
    "lion": lambda c: optax.lion(c.learning_rate, c.b1, c.b2, mu_dtype="bfloat16", weight_decay=0.0),
    "muon": lambda c: optax.contrib.muon(c.learning_rate, consistent_rms=0.2, mu_dtype="bfloat16"),
}


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_first_moments_may_be_kept_in_bfloat16(name):
    config = constant(name, first_moment="bfloat16")
    params = {"layers": {"mlp": {"up": {"kernel": random_tree(0)["student"]["layers"]["mlp"]["up"]["kernel"]}}}}
    gradients = [jax.tree.map(lambda x, n=n: np.roll(x, n) * 1e-2, params) for n in range(3)]
    got, state = run(optimizer(config, STEPS, params), params, gradients)
    for path, leaf in jax.tree.leaves_with_path(state):
        where = jax.tree_util.keystr(path)
        assert leaf.dtype == ("bfloat16" if ".mu" in where else "float32" if ".nu" in where else leaf.dtype), where
    for layer in range(DEPTH):
        one = jax.tree.map(lambda x, n=layer: x[n], params)
        want, _ = run(IN_BFLOAT16[name](config), one, [jax.tree.map(lambda x, n=layer: x[n], g) for g in gradients])
        ours, theirs = jax.tree.leaves(got)[0][layer], jax.tree.leaves(want)[0]
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * np.abs(theirs).max())
    whole, _ = run(optimizer(constant(name), STEPS, params), params, gradients)
    assert 0 < np.abs(jax.tree.leaves(whole)[0] - jax.tree.leaves(got)[0]).mean() < 1e-4
    with pytest.raises(UserError, match="adafactor keeps no first moment"):
        optimizer(constant("adafactor", first_moment="bfloat16"), STEPS, params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_goes_by_name(name):
    params = random_tree(0, jax.tree.map(lambda shape: tuple(min(n, 6) for n in shape), SHAPES, is_leaf=is_shape))
    zeros = jax.tree.map(np.zeros_like, params)
    decayed, _ = run(optimizer(constant(name, weight_decay=0.5), 1, params), params, [zeros])
    for path, leaf in jax.tree.leaves_with_path(jax.tree.map(lambda a, b: a / b, decayed, params)):
        factor = 1 - 0.01 * 0.5 if is_matrix(path[-1].key) else 1.0
        np.testing.assert_allclose(leaf, factor, rtol=1e-6, err_msg=str(path))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_keep_stacked_shapes_and_paths(name):
    params = jax.eval_shape(lambda: random_tree(0))
    state = jax.eval_shape(optimizer(constant(name), 1, params).init, params)
    leaves = {jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in jax.tree.leaves_with_path(state)}
    layers = {key: shape for key, shape in leaves.items() if "/student/layers/mlp/" in key}
    up = {key.split("/student/")[0].rsplit("/", 1)[-1]: shape for key, shape in layers.items() if "mlp/up" in key}
    moments = {
        "adamw": {"mu": (DEPTH, 128, 152), "nu": (DEPTH, 128, 152)},
        "adafactor": {"v_row": (DEPTH, 128), "v_col": (DEPTH, 152), "v": (DEPTH, 1)},
        "lion": {"mu": (DEPTH, 128, 152)},
        "muon": {"mu": (DEPTH, 128, 152)},
    }
    assert up == moments[name]
    counts = [shape for key, shape in leaves.items() if key.endswith("count")]
    assert counts and set(counts) == {()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decreases_a_convex_problem(name):
    shapes = {"layers": {"mlp": {"up": {"kernel": (2, 4, 6)}, "norm": {"scale": (2, 4)}}}, "head": {"kernel": (4, 5)}}
    target = random_tree(1, shapes)

    def loss(params):
        return sum(jnp.sum((p - t) ** 2) for p, t in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True))

    params = jax.tree.map(jnp.zeros_like, target)
    config = OptimConfig(name=name, learning_rate=0.5, warmup_steps=5)
    transformation = optimizer(config, 100, params)

    def step(carry, _):
        params, state = carry
        updates, state = transformation.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), loss(params)

    _, losses = jax.jit(lambda: jax.lax.scan(step, (params, transformation.init(params)), length=100))()
    assert losses[-1] < 0.05 * losses[0]


def test_adamw_is_the_published_algorithm_in_float64():
    shapes = {"student": {"layers": {"norm": {"scale": (2, 3)}, "up": {"kernel": (2, 3, 4)}}}}
    params = random_tree(0, shapes)
    gradients = [random_tree(seed, shapes, 0.1) for seed in range(1, 7)]
    config = OptimConfig(learning_rate=0.03, warmup_steps=2, b1=0.8, b2=0.95, eps=1e-5, weight_decay=0.2, clip_norm=0.5)
    got, _ = run(optimizer(config, 6, params), params, gradients)

    want = {
        "scale": params["student"]["layers"]["norm"]["scale"],
        "kernel": params["student"]["layers"]["up"]["kernel"],
    }
    want = {k: np.asarray(v, np.float64) for k, v in want.items()}
    m, v = ({k: np.zeros_like(p) for k, p in want.items()} for _ in range(2))
    for t, tree in enumerate(gradients):
        g = {"scale": tree["student"]["layers"]["norm"]["scale"], "kernel": tree["student"]["layers"]["up"]["kernel"]}
        g = {k: np.asarray(x, np.float64) for k, x in g.items()}
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        rate = 0.03 * ((t + 1) / 3 if t < 2 else (1 + math.cos(math.pi * (t - 2) / 4)) / 2)
        for k in want:
            clipped = g[k] * min(1.0, 0.5 / norm)
            m[k] = 0.8 * m[k] + 0.2 * clipped
            v[k] = 0.95 * v[k] + 0.05 * clipped**2
            step = (m[k] / (1 - 0.8 ** (t + 1))) / (np.sqrt(v[k] / (1 - 0.95 ** (t + 1))) + 1e-5)
            want[k] = want[k] - rate * (step + (0.2 * want[k] if k == "kernel" else 0.0))
    np.testing.assert_allclose(got["student"]["layers"]["norm"]["scale"], want["scale"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["student"]["layers"]["up"]["kernel"], want["kernel"], rtol=1e-5, atol=1e-6)


def test_muon_makes_each_layers_update_nearly_orthogonal():
    shapes = {
        "layers": {"attention": {"q": {"kernel": (DEPTH, 24, 4, 10)}, "out": {"kernel": (DEPTH, 4, 10, 24)}}},
        "head": {"kernel": (24, 60)},
    }
    params, gradients = random_tree(0, shapes), random_tree(1, shapes)
    transformation = optimizer(constant("muon", learning_rate=1.0), 1, params)
    updates = unstack(jax.jit(transformation.update)(gradients, transformation.init(params), params)[0])
    head = updates.pop("/head/kernel")
    np.testing.assert_allclose(np.abs(head), 1.0, rtol=1e-3)  # Adam's first update is the sign
    assert len(updates) == 2 * DEPTH
    for key, matrix in updates.items():
        assert sorted(matrix.shape) == [24, 40]
        singular = np.linalg.svd(matrix / (0.2 * 40**0.5), compute_uv=False)
        assert 0.5 < singular.min() and singular.max() < 1.3, key  # five iterations leave them near 1, not at 1


def test_clip_is_over_all_leaves_at_once():
    params = {"student": {"layers": {"up": {"kernel": jnp.zeros((2, 1, 2))}}, "final_norm": {"scale": jnp.zeros(1)}}}
    gradients = jax.tree.map(jnp.ones_like, params)  # five ones: norm sqrt(5)
    state = {}
    for clip_norm in (0.0, 1.0, 10.0):
        config = constant("lion", clip_norm=clip_norm, b2=0.0)  # its momentum is then the clipped gradient
        _, state[clip_norm] = run(optimizer(config, 1, params), params, [gradients])
    for clip_norm, want in {0.0: 1.0, 1.0: 5**-0.5, 10.0: 1.0}.items():
        for leaf in jax.tree.leaves(state[clip_norm][1].mu):
            np.testing.assert_allclose(leaf, want, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_have_their_closed_forms(name, final, warmup):
    total, peak = 24, 0.5
    config = OptimConfig(learning_rate=peak, schedule=name, warmup_steps=warmup, final_fraction=final)
    fall = round(0.2 * (total - warmup))

    def wanted(step):
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        x = (step - warmup) / (total - warmup)
        lost = {
            "cosine": (1 - math.cos(math.pi * x)) / 2,
            "linear": x,
            "constant": 0.0,
            "wsd": max(0.0, (step - (total - fall)) / fall),
        }
        return peak * (1 - (1 - final) * lost[name])

    rate = jax.jit(schedule(config, total))
    steps = [0, 1, warmup, (warmup + total) // 2, total - fall, total - 1, total]
    np.testing.assert_allclose([rate(s) for s in steps], [wanted(s) for s in steps], rtol=1e-5, atol=1e-7)
    ends = {"constant": peak}
    np.testing.assert_allclose(rate(total), ends.get(name, peak * final), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_absent_parts_need_no_state(name):
    layers = {"mlp": {"up": {"kernel": (2, 6, 8)}}, "mlp_norm": {"scale": (2, 6)}}
    params, gradients = (random_tree(s, {"layers": layers, "embed": {"embedding": (9, 6)}}) for s in (0, 1))
    part, part_gradients = ({"layers": tree["layers"], "embed": None, "head": {}} for tree in (params, gradients))
    alone, state = run(optimizer(constant(name), 1, part), part, [part_gradients])
    whole, _ = run(optimizer(constant(name), 1, params), params, [gradients])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), alone["layers"], whole["layers"])
    assert not any("embed" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharded_update_is_the_same_and_gathers_nothing(name):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    whole = NamedSharding(mesh, PartitionSpec())
    params, gradients = ({"layers": {"mlp": random_tree(seed)["student"]["layers"]["mlp"]}} for seed in (0, 1))
    transformation = optimizer(constant(name, clip_norm=1.0), 1, params)
    arguments = (gradients, transformation.init(params), params)
    want, _ = jax.jit(transformation.update)(*arguments)

    placed = jax.tree.map(lambda x: jax.device_put(x, split if x.ndim == 3 else whole), arguments)
    compiled = jax.jit(transformation.update).lower(*placed).compile()
    got, _ = compiled(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)
    if name != "muon":  # X @ X.T needs the rows of a matrix together
        assert "all-gather" not in compiled.as_text()
        assert all(leaf.sharding.is_equivalent_to(split, 3) for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": -1e-3}, "learning_rate is -0.001, wanted 0 or more"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"warmup_steps": 10}, "warmup_steps is 10 but the run has 10 steps"),
        ({"final_fraction": 1.5}, "final_fraction is 1.5, wanted 0 to 1"),
        ({"decay_fraction": 0.0}, "decay_fraction is 0.0"),
        ({"b1": 1.0}, "b1 is 1.0"),
        ({"b2": -0.1}, "b2 is -0.1"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0"),
        ({"name": "adamv"}, "did you mean 'adamw'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        optimizer(OptimConfig(**fields), 10, {"head": {"kernel": jnp.zeros((2, 2))}})


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(UserError, match="/student/mystery/weight has no optimiser rule"):
        optimizer(OptimConfig(), 10, {"student": {"mystery": {"weight": jnp.zeros((2, 2))}}})
