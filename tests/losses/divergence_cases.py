"""What tests of divergences share: the losses by their names, on logits, and numpy's log-softmax in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kdjax.losses import choose


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def targets(rows, vocabulary):
    """Return the data's next tokens: any will do."""
    return np.arange(rows) % vocabulary


def sum_V(x_NV):
    return jnp.sum(x_NV, -1)


def max_V(x_NV):
    return lax.stop_gradient(jnp.max(x_NV, -1))


def loss_of(text, vocab_size=None, pointwise=False):
    """Return f(student_NV, teacher_NV) of logits: the loss_N that `text` names, or its textbook terms [N, V]."""
    _, row, parameters = choose(text)

    def loss(student_NV, teacher_NV):
        rows, columns = student_NV.shape
        real = vocab_size or columns
        given = {
            "is_target_NV": jnp.arange(columns)[None, :] == jnp.asarray(targets(rows, real))[:, None],
            "max_V": max_V,
            "vocab_size": real,
        }
        more = {name: given[name] for name in row.needs} | dict(parameters)
        if row.of == "log_probs":
            student_NV, teacher_NV = jax.nn.log_softmax(student_NV), jax.nn.log_softmax(teacher_NV)
        if pointwise:
            return row.pointwise(student_NV, teacher_NV, **more)
        return row.function(student_NV, teacher_NV, sum_V, **more)

    return loss


@functools.cache
def _compiled(text, vocab_size):
    @jax.jit
    def run(student_NV, teacher_NV):
        loss_N, pullback = jax.vjp(lambda x: loss_of(text, vocab_size)(x, teacher_NV), student_NV)
        return loss_N, pullback(jnp.ones_like(loss_N))[0]

    return run


def value_and_gradient(text, student_NV, teacher_NV, vocab_size=None):
    """Return loss_N and the gradient of its sum with respect to the student's logits."""
    loss_N, gradient_NV = _compiled(text, vocab_size)(student_NV, teacher_NV)
    return np.asarray(loss_N), np.asarray(gradient_NV)
