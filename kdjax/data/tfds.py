"""TensorFlow Datasets without TensorFlow: prepared directories, and kdjax's own builder, through array_record."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from kdjax.data.python_docs import documents
from kdjax.errors import UserError, did_you_mean


class PythonDocs(tfds.core.GeneratorBasedBuilder):
    """The manual's topics and the standard library's docstrings, versioned by the Python they are from."""

    code_path = tfds.core.Path(__file__)  # tfds 4.9.10 finds it by a package that it does not require
    VERSION = tfds.core.Version(".".join(str(part) for part in sys.version_info[:3]))

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        features = tfds.features.FeaturesDict({"id": text(), "text": text(), "label": np.int64})
        return tfds.core.DatasetInfo(builder=self, description=type(self).__doc__, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(documents())


BUILDERS = {"python_docs": PythonDocs}
"""Builders that are prepared where they are first asked for: under TFDS_DATA_DIR, or tfds's own place."""


def open_prepared(name: str, split: str) -> Sequence[Mapping[str, Any]]:
    """Return the rows of a split of one of `BUILDERS`, or of a prepared directory (one with a dataset_info.json).

    Raises:
        UserError: neither, no such split, or not prepared as array_record.
    """
    try:
        builder = _own(name) if name in BUILDERS else _from_directory(name)
        return builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]  (a decorator hides its argument)
    except UserError:
        raise
    except (ValueError, NotImplementedError, OSError) as error:
        message = str(error).splitlines()[0]
        raise UserError(f"tfds:{name}@{split} cannot be read ({message}); prepare it as array_record") from None


def _from_directory(name: str) -> tfds.core.DatasetBuilder:
    path = Path(name).expanduser()
    if not (path / "dataset_info.json").is_file():
        near = sorted(path.glob("**/dataset_info.json"))
        hint = f"; did you mean {near[0].parent}?" if near else did_you_mean(name, BUILDERS)
        raise UserError(f"tfds:{name} is neither a known builder nor a prepared TFDS directory{hint}")
    return tfds.builder_from_directory(str(path))


def _own(name: str) -> tfds.core.DatasetBuilder:
    tfds.disable_progress_bar()
    builder = BUILDERS[name](data_dir=os.environ.get("TFDS_DATA_DIR"), file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    return builder
