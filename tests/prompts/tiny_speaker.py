"""A model so small that a test can ask it: bytes as tokens, random weights sharp enough that prompts matter."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.data.tokenizers import byte_tokenizer
from kdjax.models import Model, ModelConfig, export
from kdjax.models.model_file import lazy
from kdjax.prompts.config import SpeakerConfig
from kdjax.prompts.local import Local
from kdjax.sharding import MeshConfig, placement

CONFIG = ModelConfig(
    vocab_size=264, width=16, layers=2, heads=2, kv_heads=1, head_width=8, mlp_width=32, max_positions=512
)


@cache
def weights():
    rng, shapes = np.random.default_rng(3), jax.eval_shape(Model(CONFIG).init, jax.random.key(0))

    def draw(path, shape):
        return ((path[-1].key == "scale") + 0.3 * rng.normal(size=shape.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def speaker(devices=None, **more):
    place = placement(MeshConfig(), jax.devices()[:devices] if devices else None)
    params = jax.device_put(jax.tree.map(jnp.asarray, weights()), place.replicated)
    return Local(SpeakerConfig("tiny", **more), Model(CONFIG), params, byte_tokenizer(), place)


def write(directory):
    """Write the model as a directory that a config can name."""
    byte_tokenizer().save(directory.parent / "tokenizer")
    tokenizer = directory.parent / "tokenizer" / "tokenizer.json"
    return export(CONFIG, jax.tree.map(lazy, weights()), directory, tokenizer)
