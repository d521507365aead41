"""A run's whole configuration: gathers the parts' own configs, and is read from recipes, saved runs and flags."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import runpy
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_type_hints

from kdjax.checkpoint import CheckpointConfig
from kdjax.data import DataConfig, read_prompt, system_views
from kdjax.errors import UserError, did_you_mean
from kdjax.fields import from_flags, from_json
from kdjax.losses import ObjectiveConfig
from kdjax.models.config import ModelSpec
from kdjax.optim import OptimConfig
from kdjax.remote import TeacherServerConfig
from kdjax.sampling import AnswersConfig
from kdjax.sharding import MeshConfig, TeacherMeshConfig
from kdjax.teacher import LabelConfig
from kdjax.teachers import CoTeacher, why_no_cache, why_no_server, why_one

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LEAST = {
    "steps": 1,
    "batch_size": 1,
    "microbatches": 1,
    "seed": 0,
    "eval_every": 0,
    "abort_after": 1,
    "prompt_tokens": 1,
}
"""The lowest value of each number of the config's own."""


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes. A recipe in configs/ returns one from ``get_config()``."""

    name: str = "run"
    """The run directory is runs/NAME unless --run-dir says otherwise."""
    student: ModelSpec = ModelSpec()
    """The model that is trained."""
    teacher: ModelSpec | None = None
    """The model that is distilled; none means pre-training."""
    teacher_weight: float = 1.0
    """Of the teacher among `co_teachers`."""
    teacher_sources: tuple[int, ...] = ()
    """Which of data.sources, counted from 0, the teacher speaks to where it has co-teachers; empty is all."""
    co_teachers: tuple[CoTeacher, ...] = ()
    """More teachers, whose distributions are mixed with the teacher's."""
    teacher_follows: Literal["nothing", "average", "student"] = "nothing"
    """Of a student that starts as its teacher: while it trains it is taught by the teacher as it was, by the moving
    average of what the student has been, or by what the student is now. Measured is always against the first."""
    average_decay: float = 0.99
    """Share of the moving average that a step keeps."""
    teacher_server: TeacherServerConfig = TeacherServerConfig()
    """A server that speaks in the teacher's place; the config has no other teacher then."""
    cache: str = ""
    """A directory that `kdjax label` has written: what the teacher says is read from there, and it is not run."""
    label: LabelConfig = LabelConfig()
    data: DataConfig = DataConfig()
    prompt_file: str = ""
    """A text that is distilled as a prompt: the teacher has it as the system's turn, the student does not see it. Takes
    the place of data.teacher_view and data.student_view, in rows of first_fit."""
    answers: AnswersConfig = AnswersConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    teacher_mesh: TeacherMeshConfig = TeacherMeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    steps: int = 100
    """Batches to train on."""
    batch_size: int = 8
    """Rows of a batch, over all devices and microbatches."""
    microbatches: int = 1
    """Parts into which a batch is split to save memory; the result is the same."""
    seed: int = 0
    """Of random parameters and dropout (the data has its own)."""
    eval_every: int = 0
    """Steps between evaluations on held-out text; 0 evaluates before the first and after the last step only."""
    abort_after: int = 10
    """Stop when this many updates in a row had to be left out because loss or gradient was not finite."""
    prompt: str = ""
    """Continued greedily by every model at the end; empty leaves that out."""
    prompt_tokens: int = 40
    """Length of these continuations."""
    notes: tuple[str, ...] = ()
    """Lines shown at the end: what the result means, what to try next."""

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; wanted at least {least}")
        if self.seed >= 2**32:
            raise UserError(f"seed is {self.seed}; wanted below 2**32")
        if self.teacher_server.source:
            self.teacher_server.check("teacher_server")
            if why := why_no_server(self):
                raise UserError(f"teacher_server is {self.teacher_server.name}, but {why}; leave one of both out")
        if self.teacher is None and self.student.source == "teacher":
            raise UserError(
                "student.source is 'teacher' but the config has no teacher; name one or choose another source"
            )
        if self.teacher is not None and self.teacher.source == "teacher":
            raise UserError("teacher.source is 'teacher'; name a model (a directory, a known name, a run) or 'random'")
        if not 0 <= self.average_decay < 1:
            raise UserError(f"average_decay is {self.average_decay}; wanted at least 0 and below 1")
        if self.teacher_follows != "nothing" and (self.student.source != "teacher" or self.student.keep_layers):
            raise UserError(
                f"teacher_follows is {self.teacher_follows!r}, but the student does not start as the teacher; set "
                "student.source to teacher and keep all layers"
            )
        if self.teacher_mesh.devices and (self.teacher is None or self.teacher_follows != "nothing"):
            raise UserError(
                "teacher_mesh.devices gives the teacher a mesh of its own, but the config has no teacher, or one that "
                "follows the student; set it to 0"
            )
        if self.cache and (why := why_no_cache(self)):
            raise UserError(f"cache is {self.cache!r}, but {why}; leave one of both out")
        if self.co_teachers and (why := why_one(self)):
            raise UserError(f"co_teachers has {len(self.co_teachers)}, but {why}; leave one of both out")
        if self.answers.by == "teacher" and self.teacher is None and not self.teacher_server.source:
            raise UserError("answers.by is 'teacher' but the config has no teacher; name one, or set it to data")
        if self.student.soft_prompt.tokens and (self.student.trained or self.student.lora.rank):
            raise UserError("student.soft_prompt is trained alone; leave out student.lora and student.trained")
        if self.student.gist < 0 or (self.student.gist and self.student.soft_prompt.tokens):
            raise UserError(
                f"student.gist is {self.student.gist} and student.soft_prompt.tokens is "
                f"{self.student.soft_prompt.tokens}; wanted one of both, at least 0"
            )
        if self.student.gist and not (self.data.student_view and self.data.teacher_view):
            raise UserError(
                "student.gist wants two views: set data.student_view, with {{ gist }} behind the prompt, and "
                "data.teacher_view, the same without it"
            )
        if self.student.quantize != "none" or self.student.offload:
            raise UserError("student.quantize or student.offload is set, but a student is trained; set the teacher's")
        for teacher in (*filter(None, [self.teacher]), *(one.model for one in self.co_teachers)):
            if teacher.trained or teacher.lora.rank or teacher.soft_prompt.tokens or teacher.gist:
                raise UserError(
                    "teacher.trained, teacher.lora, teacher.gist or teacher.soft_prompt is set, but a teacher is not "
                    "trained; set the student's"
                )


C = TypeVar("C", bound="DataclassInstance")
"""A class of configs: `Config`, or that of another job."""


def load(target: str, kind: type[C] = Config) -> C:
    """Return the config of a recipe (.py with get_config()), a saved config.json, or a run directory.

    Raises:
        UserError: no such file, or not a config.
    """
    path = Path(target)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise UserError(
            f"no config at {str(path)!r}: wanted a recipe (.py), a config.json or a run directory{_nearest(target)}"
        )
    return _from_recipe(path, kind) if path.suffix == ".py" else from_json(_text(path), kind, str(path))


def recipes() -> list[str]:
    """Return the recipes in configs/ here, by name."""
    return [str(path) for path in sorted(Path("configs").glob("*.py"))]


def _nearest(target: str) -> str:
    return did_you_mean(target, recipes()) if recipes() else ""


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: {error}; wanted a recipe (.py) or a config.json") from error


def _from_recipe(path: Path, kind: type[C]) -> C:
    """Return what get_config() of a recipe returns, its types checked as those of a config.json are."""
    wanted = f"{kind.__module__}.{kind.__name__}"
    with _failing_as_user_error(path, kind):
        get_config = runpy.run_path(str(path)).get("get_config")
    if not callable(get_config):
        raise UserError(f"{path} has no get_config(); wanted a function that returns a {wanted}")
    with _failing_as_user_error(path, kind):
        config = get_config()
    if not isinstance(config, kind):
        raise UserError(f"get_config() of {path} returned {type(config).__name__}; wanted a {wanted}")
    with _failing_as_user_error(path, kind):
        text = json.dumps(dataclasses.asdict(config), default=os.fspath)
    return from_json(text, kind, str(path))


@contextlib.contextmanager
def _failing_as_user_error(path: Path, config: Any) -> Iterator[None]:
    """Raise whatever a recipe raises as one line, with the recipe's line that it came from."""
    try:
        yield
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path} line {lines[-1]}" if lines else str(path)
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{where}: {kind}{error}{_nearest_field(str(error), config)}") from error


def _nearest_field(message: str, config: Any) -> str:
    """Return `did you mean` for a constructor's unexpected keyword, searched in the class that it names."""
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    parts = {part.__name__: part for part in _parts(config)}
    if not match or match[1] not in parts:
        return ""
    return did_you_mean(match[2], [field.name for field in dataclasses.fields(parts[match[1]])])


def _parts(kind: Any) -> list[Any]:
    """Return a dataclass and the dataclasses within it, at any depth."""
    if get_args(kind):
        return [part for argument in get_args(kind) for part in _parts(argument)]
    if not dataclasses.is_dataclass(kind):
        return []
    return [kind, *(part for hint in get_type_hints(kind).values() for part in _parts(hint))]


def override(config: C, flags: Sequence[str], command: str) -> C:
    """Return the config with dotted flags applied, as `fields.from_flags` does.

    Flags of a teacher give one to a config that has none.
    """
    if isinstance(config, Config) and config.teacher is None and any(flag.startswith("--teacher.") for flag in flags):
        config = dataclasses.replace(config, teacher=ModelSpec())
    return from_flags(config, flags, command)


def with_prompt(config: Config) -> Config:
    """Return the config whose views are those of its `prompt_file`, read now: saved, it depends on no other file.

    Raises:
        UserError: the file cannot be read, or is empty.
    """
    if not config.prompt_file:
        return config
    views = system_views(read_prompt(Path(config.prompt_file).expanduser()))
    own = {"student_view": views.student, "teacher_view": views.teacher, "packing": "first_fit"}
    return dataclasses.replace(config, prompt_file="", data=dataclasses.replace(config.data, **own))
