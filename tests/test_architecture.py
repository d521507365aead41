"""The house holds: which way imports go, and what stands in one place only. Read over the sources, nothing is run."""

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = 400

# Top to bottom: an import goes down or stays on its floor, never up or in a circle. A package is one row entry.
FLOORS = (
    ("the door", {"cli", "__main__", "arguments", "commands"}),
    (
        "jobs",
        {"train", "build", "job", "named", "jobs", "student", "summary", "answers", "recovery", "on_policy"}
        | {"search", "synthesis", "pipeline", "effect", "plan", "utilisation", "label", "labelled"},
    ),
    ("what a job is made of", {"config", "step", "evaluate", "report"}),
    ("parts", {"models", "data", "losses", "prompts", "teacher", "teachers", "remote", "generate", "sampling"}),
    (
        "tools",
        {
            "sharding",
            "optim",
            "checkpoint",
            "metrics",
            "console",
            "environment",
            "fields",
            "cache",
            "distributed",
            "profile",
            "stopping",
            "lock",
            "manifest",
            "server",
            "shapes",
        },
    ),
    ("ground", {"errors", "__init__"}),
)
CONFIG_READERS = {"the door", "jobs"}  # below them each part has its own small config, which config.py gathers
STRANGERS = {"models", "data", "losses"}  # never import each other: they meet in shapes and plain arrays
HOMES = {  # what is named in one part alone
    "import flax": "models",
    "shard_map": "sharding",
    "make_mesh": "sharding",
    "Mesh()": "sharding",
}

Sources = dict[str, str]  # dotted module -> its text


def sources() -> Sources:
    found = {}
    for path in sorted((ROOT / "kdjax").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def part_of(module: str) -> str:
    """Return the row entry of FLOORS: kdjax.models.config -> models, kdjax -> __init__."""
    return [*module.split("."), "__init__"][1]


@functools.cache
def nodes(text: str) -> tuple[ast.AST, ...]:
    """Return all nodes of a source; every rule looks at the same ones."""
    return tuple(ast.walk(ast.parse(text)))


def imports(text: str, modules: Sources) -> Iterator[str]:
    """Yield each dotted name that is imported, at the top or in a function; relative ones begin with a dot."""
    for node in nodes(text):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            for alias in node.names:
                yield f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in modules else origin


def inner_imports(modules: Sources) -> Iterator[tuple[str, str]]:
    """Yield (module, kdjax module that it imports)."""
    for module, text in modules.items():
        for target in imports(text, modules):
            if target.split(".")[0] == "kdjax":
                yield module, target


def unknown_parts(modules: Sources) -> Iterator[str]:
    known = set().union(*(parts for _, parts in FLOORS))
    for module in modules:
        if part_of(module) not in known:
            yield f"{module} stands on no floor: add {part_of(module)} to a row of FLOORS in tests/test_architecture.py"


def imports_up(modules: Sources) -> Iterator[str]:
    floor = {part: number for number, (_, parts) in enumerate(FLOORS) for part in parts}
    name = {part: name for name, parts in FLOORS for part in parts}
    for module, target in inner_imports(modules):
        here, there = part_of(module), part_of(target)
        if here in floor and there in floor and floor[there] < floor[here]:
            yield f"{module} ({name[here]}) imports {target} ({name[there]}), which is above it"


def circles(modules: Sources) -> Iterator[str]:
    graph: dict[str, set[str]] = {}
    for module, target in inner_imports(modules):
        graph.setdefault(module, set()).add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        yield "a circle of imports: " + " <- ".join(error.args[1])


def relative_imports(modules: Sources) -> Iterator[str]:
    for module, text in modules.items():
        if any(target.startswith(".") for target in imports(text, modules)):
            yield f"{module} imports relatively: write kdjax.… in full"


def config_read_below_the_jobs(modules: Sources) -> Iterator[str]:
    may = set().union(*(parts for name, parts in FLOORS if name in CONFIG_READERS))
    for module, target in inner_imports(modules):
        if target == "kdjax.config" and part_of(module) not in may:
            yield f"{module} imports kdjax.config: let it take its own part's config"


def strangers_meet(modules: Sources) -> Iterator[str]:
    for module, target in inner_imports(modules):
        here, there = part_of(module), part_of(target)
        if here != there and {here, there} <= STRANGERS:
            yield f"{module} imports {target}: {here} and {there} meet in shapes and plain arrays only"


def out_of_their_home(modules: Sources) -> Iterator[str]:
    for module, text in modules.items():
        for thing in sorted(things(text)):
            if thing in HOMES and HOMES[thing] != part_of(module):
                yield f"{module} has {thing}, whose only place is kdjax/{HOMES[thing]}"


def things(text: str) -> set[str]:
    """Return the names a text uses, with "()" those it calls, and "import x" for the packages it imports."""
    found = {f"import {target.split('.')[0]}" for target in imports(text, {})}
    for node in nodes(text):
        if isinstance(node, ast.Call):
            found |= {f"{name}()" for name in names(node.func)}
        found |= names(node)
    return found


def names(node: ast.AST) -> set[str]:
    """Return the last name of `a`, `x.a`, `import x.a` and of `from x import a as b`."""
    if isinstance(node, ast.Name):
        return {node.id}
    if isinstance(node, ast.Attribute):
        return {node.attr}
    return {node.name.split(".")[-1]} if isinstance(node, ast.alias) else set()


def bare_asserts(modules: Sources) -> Iterator[str]:
    for module, text in modules.items():
        for node in nodes(text):
            if isinstance(node, ast.Assert):
                yield f"{module} line {node.lineno}: a bare assert, which python -O drops; raise an error that says how"


def long_files(modules: Sources) -> Iterator[str]:
    for module, text in modules.items():
        if (lines := len(text.splitlines())) > LINES:
            yield f"{module} has {lines} lines, wanted at most {LINES}: split it by meaning"


RULES = (
    unknown_parts,
    imports_up,
    circles,
    relative_imports,
    config_read_below_the_jobs,
    strangers_meet,
    out_of_their_home,
    bare_asserts,
    long_files,
)


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps(rule):
    broken = list(rule(sources()))
    assert not broken, "\n" + "\n".join(broken)


def test_every_row_of_the_floors_stands():
    gone = set().union(*(parts for _, parts in FLOORS)) - {part_of(module) for module in sources()}
    assert not gone, f"no longer in kdjax/, so take out of FLOORS: {sorted(gone)}"


@pytest.mark.parametrize(
    ("rule", "module", "text"),
    [
        (unknown_parts, "kdjax.novelty", ""),
        (unknown_parts, "kdjax.novelty.inner", ""),
        (imports_up, "kdjax.errors", "import kdjax.shapes"),
        (imports_up, "kdjax.models.layers", "def f():\n    from kdjax.train import train"),
        (imports_up, "kdjax.optim", "from kdjax import step"),
        (circles, "kdjax.errors", "from kdjax.errors import UserError"),
        (circles, "kdjax.errors", "from kdjax import shapes"),
        (relative_imports, "kdjax.optim", "from . import errors"),
        (relative_imports, "kdjax.models.layers", "from .config import ModelConfig"),
        (config_read_below_the_jobs, "kdjax.step", "from kdjax.config import Config"),
        (config_read_below_the_jobs, "kdjax.evaluate", "from kdjax import config"),
        (strangers_meet, "kdjax.losses.fused", "from kdjax.models import Model"),
        (strangers_meet, "kdjax.data.examples", "import kdjax.losses.fused"),
        (out_of_their_home, "kdjax.losses.fused", "from flax import linen as nn"),
        (out_of_their_home, "kdjax.losses.fused", "import flax.linen as nn"),
        (out_of_their_home, "kdjax.losses.fused", "import jax\nf = jax.shard_map"),
        (out_of_their_home, "kdjax.train", "from jax import make_mesh as f"),
        (out_of_their_home, "kdjax.train", "from jax.sharding import Mesh\nmesh = Mesh([], ())"),
        (bare_asserts, "kdjax.step", "def f(x):\n    assert x"),
        (long_files, "kdjax.step", "x = 1\n" * (LINES + 1)),
    ],
)
def test_a_breach_is_seen(rule, module, text):
    house = sources()
    broken = set(rule({**house, module: text})) - set(rule(house))
    assert any(module in line for line in broken)


def test_what_is_allowed_is_not_called_a_breach():
    allowed = {
        "kdjax.train": "from kdjax.config import Config\nfrom kdjax.build import build",
        "kdjax.build": "import kdjax.models.config",
        "kdjax.models.config": '"""shard_map and Mesh( in words only."""\nfrom kdjax.errors import UserError',
        "kdjax.models.layers": "import flax.linen as nn\nfrom kdjax.models.config import ModelConfig",
        "kdjax.errors": "from jax.sharding import Mesh\ndef f(mesh: Mesh): ...",
    }
    assert [line for rule in RULES for line in rule(allowed)] == []
