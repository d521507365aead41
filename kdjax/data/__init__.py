"""Data: sources of real text, a held-out split, tokens and weights, packing, and a stream of batches that resumes."""

from kdjax.data.config import DataConfig
from kdjax.data.pipeline import Data, build, merge_states
from kdjax.data.tokenizers import Tokenizer, check_fits, load_tokenizer
from kdjax.data.vocabulary import trim_tokenizer

__all__ = ["Data", "DataConfig", "Tokenizer", "build", "check_fits", "load_tokenizer", "merge_states", "trim_tokenizer"]
