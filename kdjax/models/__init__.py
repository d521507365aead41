"""Models: one Transformer, a table of families, and weights from files, lazily."""

from kdjax.models.attention import Cache, Prefix, attend
from kdjax.models.config import DType, ModelConfig, ModelSpec
from kdjax.models.convert import export
from kdjax.models.gist import compressed
from kdjax.models.importance import Importance
from kdjax.models.model_file import LazyTensor, ModelFile, select_kept, select_layers
from kdjax.models.open import open_model
from kdjax.models.paths import byte_count, parameter_count
from kdjax.models.prefix import prefix_of
from kdjax.models.prune import Cut
from kdjax.models.transformer import TAPS, Model, bare

__all__ = [
    "TAPS",
    "Cache",
    "Cut",
    "DType",
    "Importance",
    "LazyTensor",
    "Model",
    "ModelConfig",
    "ModelFile",
    "ModelSpec",
    "Prefix",
    "attend",
    "bare",
    "byte_count",
    "compressed",
    "export",
    "open_model",
    "parameter_count",
    "prefix_of",
    "select_kept",
    "select_layers",
]
