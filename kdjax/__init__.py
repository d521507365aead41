"""kdjax distils large language models, and the prompts that steer them, into smaller and faster ones, in JAX."""

__version__ = "0.1.0"
