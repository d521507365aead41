"""What each divergence makes of a student that is too small: one bump fitted to a teacher with two.

COMMAND: python -m benchmarks.divergences     (half a minute on 2 CPU cores; writes docs/divergences.svg)

The student is a discretised Gaussian with a free mean and width over 200 tokens in a row; the teacher has two bumps, of
60 and 40 per cent. Each divergence is minimised by Adam from the same six starts, and the fit of the smallest loss is
drawn: what seeks modes settles on the larger bump, what covers spreads over both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure

from benchmarks import harness
from kdjax.losses import choose
from kdjax.shapes import Array

PICTURE = harness.ROOT / "docs" / "divergences.svg"
TEXTS = (
    *("forward_kl", "reverse_kl", "symmetric_kl", "jsd"),
    *("jsd(beta=0.1)", "jsd(beta=0.9)", "interpolated_jsd(beta=0.1)", "interpolated_jsd(beta=0.9)"),
    *("skewed_forward_kl", "skewed_reverse_kl", "total_variation", "alpha_beta"),
    *("adaptive_kl", "decoupled_kd", "mse", "cosine"),
    *("soft_cross_entropy", "hard_cross_entropy"),
)
TOKENS, STEPS = 200, 1500
PLACES_V = jnp.linspace(-5.0, 5.0, TOKENS)
STARTS = jnp.array([(mean, log_width) for mean in (-2.0, 0.0, 2.0) for log_width in (-0.5, 0.8)])
BUMPS = ((0.6, -2.0, 0.6), (0.4, 2.0, 0.6))
"""Mass, mean and width of each; a trace of uniform mass keeps the teacher's logits finite between and beyond them."""
TRACE = 1e-3
STYLE: Any = {"svg.hashsalt": "kdjax", "svg.fonttype": "path", "font.size": 9, "font.family": "DejaVu Sans"}
TEACHER, STUDENT, NOTE = "#c9ced6", "#2f6fbb", "#56637a"


def bump(mean: Array | float, width: Array | float) -> Array:
    """Return logits_V of a Gaussian over the places."""
    return -0.5 * jnp.square((PLACES_V - mean) / width)


def teacher_logits() -> Array:
    p_V = sum(mass * jax.nn.softmax(bump(mean, width)) for mass, mean, width in BUMPS)
    return jnp.log((1 - TRACE) * p_V + TRACE / TOKENS)


def loss(text: str, student_V: Array, teacher_V: Array) -> Array:
    """Return the divergence of one row of logits; its target, where asked for, is the teacher's likeliest token."""
    _, row, parameters = choose(text)
    given = {
        "is_target_NV": (jnp.arange(TOKENS) == jnp.argmax(teacher_V))[None],
        "max_V": lambda x_NV: lax.stop_gradient(jnp.max(x_NV, -1)),
        "vocab_size": TOKENS,
    }
    # As logits, log-probabilities: the level of a bump's own means nothing, and MSE and cosine would see it.
    both = (jax.nn.log_softmax(student_V)[None], jax.nn.log_softmax(teacher_V)[None])
    needed = {name: given[name] for name in row.needs}
    return row.function(*both, lambda x_NV: jnp.sum(x_NV, -1), **needed, **dict(parameters))[0]


def fit(text: str) -> tuple[float, float]:
    """Return the mean and width of the student that `text` likes best."""
    teacher_V = teacher_logits()
    optimiser = optax.adam(optax.cosine_decay_schedule(0.05, STEPS))

    def of(shape: Array) -> Array:
        return loss(text, bump(shape[0], jnp.exp(shape[1])), teacher_V)

    def step(carry: tuple[Array, optax.OptState], _) -> tuple[tuple[Array, optax.OptState], None]:
        shape, state = carry
        updates, state = optimiser.update(jax.grad(of)(shape), state)
        return (jnp.clip(shape + updates, jnp.array([-5.0, -2.3]), jnp.array([5.0, 2.3])), state), None

    @jax.jit
    @jax.vmap
    def descend(start: Array) -> tuple[Array, Array]:
        (shape, _), _ = lax.scan(step, (start, optimiser.init(start)), None, length=STEPS)
        return shape, of(shape)

    shapes, losses = descend(STARTS)
    mean, log_width = np.asarray(shapes[jnp.argmin(losses)])
    return float(mean), float(np.exp(log_width))


def draw(fits: dict[str, tuple[float, float]], path: Path) -> None:
    x_V, teacher_V = PLACES_V[::2], jax.nn.softmax(teacher_logits())  # half the points: a small file
    columns, rows = 4, len(fits) // 4 + 1  # with room for the key
    figure = Figure(figsize=(9.6, 1.6 * rows), layout="constrained")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
    for place, (text, (mean, width)) in enumerate(fits.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        teacher = axes.fill_between(x_V, teacher_V[::2], color=TEACHER, linewidth=0)
        (student,) = axes.plot(x_V, jax.nn.softmax(bump(mean, width))[::2], color=STUDENT, linewidth=1.6)
        axes.set_title(text, fontsize=9, loc="left")
        where = {"x": 0.98, "y": 0.97, "ha": "right", "va": "top", "transform": axes.transAxes}
        axes.text(s=f"mean {mean:.2f}\nwidth {width:.2f}", fontsize=7.5, color=NOTE, **where)
        axes.set(ylim=(0, 0.042), xlim=(-5, 5), xticks=[], yticks=[])
        axes.spines[["top", "left", "right"]].set_visible(False)
    key = figure.add_subplot(rows, columns, rows * columns)
    key.legend([teacher, student], ["teacher", "student"], loc="center", frameon=False)
    key.set_axis_off()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit all, print the fits and draw them in the place of the picture there was; of a trial only print two."""
    options = harness.parser(__doc__, PICTURE).parse_args(arguments)
    fits = {text: fit(text) for text in (TEXTS[:2] if options.quick else TEXTS)}
    for text, (mean, width) in fits.items():
        print(f"{text:28} mean {mean:+.3f}  width {width:.3f}")
    if not options.quick:
        with matplotlib.rc_context(STYLE):
            draw(fits, options.results)
    return 0


if __name__ == "__main__":
    harness.leave(main)
