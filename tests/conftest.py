"""Eight forced CPU devices, strict rank promotion and quick compilation for every test.

Nearly all the time of the tests is XLA's, in compiling what then runs for a moment, so it does not optimise here. What
a test starts in a process of its own compiles as users do.
"""

import gc
import os
from unittest import mock

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)

flags = os.environ.get("XLA_FLAGS", "").split()
if jax.__version_info__ < (0, 11):  # later XLAs have no such flag, and end the process at one that they do not know
    flags.append("--xla_cpu_use_fusion_emitters=false")
with mock.patch.dict(os.environ, XLA_FLAGS=" ".join(flags)):
    jax.devices()  # reads the flags; later processes do not see them


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
    """Keep what is compiled: the next test that builds the same job finds it."""
    directory = tmp_path_factory.getbasetemp() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    reset_cache()
    return directory


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """Let go of a module's compiled functions: each is mapped into memory piece by piece, and Linux ends a process that
    has more than `vm.max_map_count` (65,530) pieces, which two workers' tests come to.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def optimised():
    """Compile what is compiled within as users do: for bounds that a compiler's order of sums decides."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
