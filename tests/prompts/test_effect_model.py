"""What a prompt does inside a model, against float64 on each text alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_speaker import CONFIG, speaker, weights

from kdjax.models import Model
from kdjax.prompts import effect_model
from kdjax.prompts.effect_model import cache_bytes, compare
from kdjax.prompts.likelihood import in_batch
from kdjax.shapes import View

TRIPLES = [
    ("Say it loud. x", "x", "yes"), ("Say it low. y", "y", "a longer answer"), ("so", "so", "n"),
    ("a long question " * 3 + "z", "z", "no"),
]  # fmt: skip


@jax.jit
def hidden(params, view):
    return Model(CONFIG).apply(params, view).hidden_BTD


def log_probs(prompt, answer):
    """Log-probabilities in float64 of the whole vocabulary at each token of the answer, and the answer's tokens."""
    before, after = prompt.encode(), f" {answer}".encode()
    tokens = [*before, *after]
    position_BT = jnp.arange(64)[None]
    padded_BT = jnp.array([tokens + [0] * (64 - len(tokens))])
    view = View(padded_BT, (position_BT < len(tokens)).astype(jnp.int32), position_BT)
    hidden_TD = np.asarray(hidden(jax.tree.map(jnp.asarray, weights()), view)[0], np.float64)
    logits_TV = (hidden_TD @ np.asarray(Model(CONFIG).head(weights()).w_DV, np.float64))[:, : CONFIG.vocab_size]
    logits_TV -= logits_TV.max(1, keepdims=True)
    log_probs_TV = logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True))
    return log_probs_TV[len(before) - 1 : len(tokens) - 1], list(after)


@pytest.mark.parametrize(("devices", "batch_tokens"), [pytest.param(1, 64, marks=pytest.mark.slow), (8, 4096)])
def test_divergence_by_position_is_that_of_float64(devices, batch_tokens):
    found = compare(speaker(devices, chat=False, batch_tokens=batch_tokens), TRIPLES)
    for one, (prompt, bare, answer) in zip(found, TRIPLES, strict=True):
        (p_RV, tokens), (q_RV, _) = log_probs(prompt, answer), log_probs(bare, answer)
        kl_R = (np.exp(p_RV) * (p_RV - q_RV)).sum(1)
        np.testing.assert_allclose(one.kl, kl_R, rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(one.prompted, p_RV[np.arange(len(tokens)), tokens], rtol=2e-4)
        np.testing.assert_allclose(one.unprompted, q_RV[np.arange(len(tokens)), tokens], rtol=2e-4)
    assert min(found[0].kl) > 1e-4 and found[2].kl == [0.0] * 2


def test_distributions_exist_for_one_place_of_each_row_at_a_time():
    tiny = speaker(1)
    asked = in_batch([((1,) * 60, {place: [7] for place in range(40)})], 4, 64)
    both = effect_model.Both(asked, asked)
    jaxpr = str(jax.make_jaxpr(lambda b: effect_model.divergences(tiny.model, tiny.params, b))(both))
    assert "4,264]" in jaxpr and "64,264]" not in jaxpr and "4,64,264" not in jaxpr


def test_the_cache_has_keys_and_values_of_every_layer():
    assert cache_bytes(Model(CONFIG), 10) == 2 * 2 * 10 * 1 * 8 * 4  # k and v, layers, tokens, heads, width, bytes
