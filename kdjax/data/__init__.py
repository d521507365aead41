"""Data: sources of real text, a held-out split, tokens and weights, packing, and a stream of batches that resumes."""

from kdjax.data.across import student_of
from kdjax.data.cache import Cache, cached, open_cache
from kdjax.data.config import DataConfig
from kdjax.data.packing import Asked, answered, examples_of, in_rows, reanswered, rows_of
from kdjax.data.pipeline import Data, build, merge_states
from kdjax.data.questions import Question, check_text, encode_prompt, questions
from kdjax.data.tokenizers import Tokenizer, check_fits, load_tokenizer, with_template
from kdjax.data.views import SCRATCHPAD, read_prompt, system_views
from kdjax.data.vocabulary import trim_tokenizer

__all__ = [
    "SCRATCHPAD",
    "Asked",
    "Cache",
    "Data",
    "DataConfig",
    "Question",
    "Tokenizer",
    "answered",
    "build",
    "cached",
    "check_fits",
    "check_text",
    "encode_prompt",
    "examples_of",
    "in_rows",
    "load_tokenizer",
    "merge_states",
    "open_cache",
    "questions",
    "reanswered",
    "rows_of",
    "read_prompt",
    "system_views",
    "student_of",
    "trim_tokenizer",
    "with_template",
]
