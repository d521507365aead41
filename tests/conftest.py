"""Eight forced CPU devices and strict rank promotion for every test; quick compilation where nothing is slow.

Nearly all the time of a quick test is XLA's, in compiling what then runs for a moment, so the fast tier compiles
without optimising. The slow tier compiles as users do.
"""

import os

import jax


def pytest_configure(config):
    if config.option.markexpr == "not slow":
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
        jax.config.update("jax_disable_most_optimizations", True)


jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
