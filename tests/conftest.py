"""Eight forced CPU devices, strict rank promotion and quick compilation for every test.

Nearly all the time of the tests is XLA's, in compiling what then runs for a moment, so it does not optimise here. What
a test starts in a process of its own compiles as users do.
"""

import os

import jax

QUICK = "--xla_cpu_use_fusion_emitters=false"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)

before = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = f"{before or ''} {QUICK}"
jax.devices()  # reads the flags; later processes do not see them
if before is None:
    del os.environ["XLA_FLAGS"]
else:
    os.environ["XLA_FLAGS"] = before
