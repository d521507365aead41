"""From an `OptimConfig` to one optax chain: clip, the optimiser's own rule, weight decay, schedule.

Rules go by parameter name (`RULES`), and each layer of a stack is updated as if it stood alone: an optimiser that looks
at a whole tensor (Adafactor's factors and clip, Muon's matrices) must not look across the layers that a scan stacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import optax

from kdjax.errors import UserError, did_you_mean


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its learning rate over a run."""

    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    """`muon` is for the kernels within layers; embeddings, head, norms and biases go to Adam beside it."""
    learning_rate: float = 1e-3
    """The highest of the run. One scale for all: Adafactor takes it as it is (no relative step, no scaling by the
    parameter), Muon's updates have the size of AdamW's; only Lion wants 3 to 10 times less."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How it falls after the warm-up; `wsd` stays at the top, then falls linearly (warm-up, stable, decay)."""
    warmup_steps: int = 0
    """Updates before the first one at the full learning rate; they rise to it in equal steps, none of them from 0."""
    final_fraction: float = 0.0
    """Where the schedule ends, as a fraction of the highest learning rate; `constant` has none."""
    decay_fraction: float = 0.2
    """Of the steps after the warm-up, the part in which `wsd` falls."""
    b1: float = 0.9
    """Decay of the first moment in Adam and Lion; Adafactor keeps no first moment, Muon's momentum is 0.95."""
    b2: float = 0.99
    """Decay of the second moment in Adam, of the momentum in Lion; Adafactor's is 1 - step^-0.8."""
    first_moment: Literal["float32", "bfloat16"] = "float32"
    """What Adam's and Lion's first moment and Muon's momentum are kept in; bfloat16 halves their memory. Second moments
    stay float32: what a step adds to them, 1 - b2, would be lost in bfloat16."""
    eps: float = 1e-8
    """Added to the denominator in Adam."""
    weight_decay: float = 0.0
    """Decoupled (times the learning rate), on kernels and embeddings only."""
    clip_norm: float = 1.0
    """The highest norm of all gradients together; 0 does not clip."""


class Rule(NamedTuple):
    """How a kind of parameter is treated."""

    decays: bool
    """Weight decay applies."""
    inputs: int
    """Leading axes (of one layer's tensor) that a matrix sums over, its rows; 0 is no matrix but a vector."""
    orthogonal: bool = False
    """Muon makes its update orthogonal."""


RULES = {
    "/out/kernel": Rule(decays=True, inputs=2, orthogonal=True),
    "/soft_prompt/embedding": Rule(decays=False, inputs=0),
    "/soft_prompt/k": Rule(decays=False, inputs=0),
    "/soft_prompt/v": Rule(decays=False, inputs=0),
    "/gist/embedding": Rule(decays=False, inputs=0),
    "/head/kernel": Rule(decays=True, inputs=1),
    "/kernel": Rule(decays=True, inputs=1, orthogonal=True),
    "/embedding": Rule(decays=True, inputs=1),
    "/out/lora_a": Rule(decays=True, inputs=2, orthogonal=True),
    "/lora_a": Rule(decays=True, inputs=1, orthogonal=True),
    "/lora_b": Rule(decays=True, inputs=1, orthogonal=True),
    "/scale": Rule(decays=False, inputs=0),
    "/bias": Rule(decays=False, inputs=0),
}
"""The end of a parameter's path -> its rule; the first that fits counts."""

STACKS = ("/layers/", "/experts/")
"""Subtrees whose leaves have one more leading axis, over what is updated each for itself."""


def optimizer(config: OptimConfig, total_steps: int, params_abstract: Any) -> optax.GradientTransformation:
    """Return the chain: clip by global norm, the core rule layer by layer, decoupled weight decay, schedule.

    The state is arrays only; moments stand in trees like the parameters', so a moment's path ends in its parameter's.

    Raises:
        UserError: a value of `config` is out of range, or a parameter's name has no rule.
    """
    rate = schedule(config, total_steps)
    decays = _map_with_rule(lambda rule, _: rule.decays, params_abstract)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        per_layer(OPTIMIZERS[config.name](config)),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(rate),
    )


def schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the updates done.

    With w warm-up steps it is (step + 1)/(w + 1) of the highest up to step w, and ends at `total_steps`, one past the
    last update: no update is spent on a learning rate of 0.

    Raises:
        UserError: a value of `config` is out of range.
    """
    _check(config, total_steps)
    after = SCHEDULES[config.schedule](config, total_steps - config.warmup_steps)
    if not config.warmup_steps:
        return after
    first = config.learning_rate / (config.warmup_steps + 1)
    rise = optax.linear_schedule(first, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([rise, after], [config.warmup_steps])


def per_layer(core: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return `core` made to see each layer of a stack alone: it is vmapped over the leading axis of each stack.

    A stack is a subtree named as one of `STACKS`; there may be several, and one within another (the experts of a
    layer), where each of the inner ones stands alone too. What `core` keeps for a parameter must have a path that ends
    in the parameter's; such state is stacked too, all other state (counts) is not.
    """

    def init(params: Any) -> Any:
        paths = jax.eval_shape(core.init, params)
        return _vmap_stacks(core.init, (params,), paths)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return _vmap_stacks(core.update, (updates, state, params), (updates, state))

    return optax.GradientTransformation(init, update)


def _vmap_stacks(function: Callable, arguments: tuple, like_results: Any) -> Any:
    """Return function(*arguments), vmapped once for each stack; `like_results` has the paths of the results."""
    names = [_name(path) for path, _ in jax.tree.leaves_with_path(arguments[0])]
    stacks = {name.partition(stack)[0] + stack for name in names for stack in STACKS if stack in name}

    def axes(stack: str, tree: Any) -> Any:
        def axis(path: tuple, _: Any) -> int | None:
            # The longest, and what it lies in: lora/student/layers/ ends like student/layers/ and is not in it.
            holding = max((other for other in stacks if other in _name(path)), key=len, default="")
            return 0 if holding.startswith(stack) else None

        return jax.tree.map_with_path(axis, tree)

    for stack in sorted(stacks, key=len, reverse=True):  # what lies in another is its inner axis
        function = jax.vmap(function, in_axes=axes(stack, arguments), out_axes=axes(stack, like_results))
    return function(*arguments)


def as_matrices(core: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return `core` made to see each kernel as its matrix, [inputs, outputs], and each other leaf as a vector."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        matrices, state = core.update(_matrices(updates), state, _matrices(params))
        return jax.tree.map(lambda matrix, like: matrix.reshape(like.shape), matrices, updates), state

    return optax.GradientTransformation(lambda params: core.init(_matrices(params)), update)


def _matrices(tree: Any) -> Any:
    def view(rule: Rule, leaf: jax.Array) -> jax.Array:
        rows = (math.prod(leaf.shape[: rule.inputs]),) if rule.inputs else ()
        return leaf.reshape(*rows, -1)

    return _map_with_rule(view, tree)


def _map_with_rule(function: Callable[[Rule, Any], Any], tree: Any) -> Any:
    return jax.tree.map_with_path(lambda path, leaf: function(_rule(_name(path)), leaf), tree)


def _rule(name: str) -> Rule:
    for end, rule in RULES.items():
        if name.endswith(end):
            return rule
    known = ", ".join(RULES)
    raise UserError(f"parameter {name} has no optimiser rule, wanted a name that ends in one of {known}; add a row")


def _name(path: tuple) -> str:
    return "/" + jax.tree_util.keystr(path, simple=True, separator="/")


def _adamw(config: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.first_moment)


def _lion(config: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_lion(config.b1, config.b2, mu_dtype=config.first_moment)


def _adafactor(config: OptimConfig) -> optax.GradientTransformation:
    """Paper: Shazeer and Stern 2018, Adafactor, arXiv:1804.04235, without relative steps and parameter scale."""
    del config
    return as_matrices(optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)))


def _muon(config: OptimConfig) -> optax.GradientTransformation:
    """Paper: Liu et al. 2025, Muon is scalable for LLM training, arXiv:2502.16982 (the size of its updates)."""

    def dimensions(tree: Any) -> Any:
        def split(rule: Rule, leaf: Any) -> optax.contrib.MuonDimensionNumbers:
            axes = tuple(range(leaf.ndim))
            return optax.contrib.MuonDimensionNumbers(axes[: rule.inputs], axes[rule.inputs :])

        return _map_with_rule(split, tree)

    def to_adamw_size(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda update, matrix: 0.2 * max(matrix.shape) ** 0.5 * update, updates, _matrices(updates))

    kernels = optax.chain(
        optax.contrib.scale_by_muon(beta=0.95, mu_dtype=config.first_moment, weight_dimension_numbers=dimensions),
        optax.stateless(to_adamw_size),
    )

    def labels(tree: Any) -> Any:
        return _map_with_rule(lambda rule, _: "muon" if rule.orthogonal else "adam", tree)

    return optax.partition({"muon": kernels, "adam": _adamw(config)}, labels)


OPTIMIZERS: dict[str, Callable[[OptimConfig], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}
"""Name -> the core rule for one layer's gradients; learning rate, clip and weight decay are the chain's."""


def _cosine(config: OptimConfig, steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(config.learning_rate, steps, config.final_fraction)


def _linear(config: OptimConfig, steps: int) -> optax.Schedule:
    return optax.linear_schedule(config.learning_rate, config.learning_rate * config.final_fraction, steps)


def _constant(config: OptimConfig, steps: int) -> optax.Schedule:
    del steps
    return optax.constant_schedule(config.learning_rate)


def _wsd(config: OptimConfig, steps: int) -> optax.Schedule:
    falling = max(1, round(config.decay_fraction * steps))
    return optax.join_schedules([_constant(config, steps), _linear(config, falling)], [steps - falling])


SCHEDULES: dict[str, Callable[[OptimConfig, int], optax.Schedule]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "wsd": _wsd,
}
"""Name -> the learning rate over the steps that follow the warm-up."""


_WANTED: dict[str, tuple[Callable[[float], bool], str]] = {
    "learning_rate": (lambda x: 0 <= x < math.inf, "0 or more"),
    "warmup_steps": (lambda x: x >= 0, "0 or more"),
    "final_fraction": (lambda x: 0 <= x <= 1, "0 to 1"),
    "decay_fraction": (lambda x: 0 < x <= 1, "above 0, up to 1"),
    "b1": (lambda x: 0 <= x < 1, "0 or more, below 1"),
    "b2": (lambda x: 0 <= x < 1, "0 or more, below 1"),
    "eps": (lambda x: 0 < x < math.inf, "above 0"),
    "weight_decay": (lambda x: 0 <= x < math.inf, "0 or more"),
    "clip_norm": (lambda x: 0 <= x < math.inf, "0 (no clipping) or more"),
}


def _check(config: OptimConfig, total_steps: int) -> None:
    for field, (good, wanted) in _WANTED.items():
        value = getattr(config, field)
        if not good(value):
            raise UserError(f"{field} is {value}, wanted {wanted}")
    for field, table in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
        value = getattr(config, field)
        if value not in table:
            raise UserError(f"{field} of the optimiser's config is {value!r}{did_you_mean(value, table)}")
    if config.name == "adafactor" and config.first_moment != "float32":
        raise UserError("first_moment is 'bfloat16', but adafactor keeps no first moment; leave it out")
    if total_steps <= config.warmup_steps:
        raise UserError(
            f"warmup_steps is {config.warmup_steps} but the run has {total_steps} steps; "
            f"wanted fewer than the run's steps: lower warmup_steps or train longer"
        )
