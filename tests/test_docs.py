"""What the documents say is there: links, files, tests, commands, flags, versions, figures. And nobody's own paths."""

import ast
import json
import re
import runpy
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

import kdjax
from kdjax import cli, config
from kdjax.errors import UserError
from kdjax.pipeline import PipelineConfig
from kdjax.prompts.config import EffectConfig, PromptsConfig, SpeakerConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
QUICKSTART = "python -m pip install -e . && kdjax train configs/quickstart.py"
TESTS = 'python -m pip install -e ".[test]" && python -m pytest'
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

SEARCH = PromptsConfig(scorer=SpeakerConfig("a-model"))
CONFIGS = {
    "train": config.Config(),
    "plan": config.Config(),
    "answers": config.Config(),
    "label": config.Config(),
    "prompts": SEARCH,
    "effect": EffectConfig(SEARCH),
    "pipeline": PipelineConfig(SEARCH, config.Config()),
}

README = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
COMMAND = re.compile(r"(?:\s*[A-Z_]+=\S+)*\s*(?:srun )?((?:kdjax|python -m|bash) .+)")
MACHINE = re.compile(
    r"(?<![\w.~$}*-])/(?:home|root|work|farm|Users|tmp|mnt|srv|opt)/\w"
    r"|pypi\.org|pythonhosted\.org|registry\.npmjs|download\.pytorch|--(?:extra-)?index-url"
)


def dead_links(text, folder):
    """Yield each link and picture to a file or a heading that is not there; those to the web are not followed."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = folder / path if path else None
        if file is not None and not file.exists():
            yield f"{target}: no such file"
        elif anchor and anchor not in anchors(file.read_text() if file else text):
            yield f"{target}: no such heading"


def anchors(text):
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_files(text):
    """Yield each path of the project in code that is not there; a part in capitals stands for any name."""
    for path in re.findall(r"`((?:kdjax|configs|tests|benchmarks|docs)/[\w./-]+)[`:]", text):
        if not re.search(r"\b[A-Z]{2,}\b", path) and not (ROOT / path).exists():
            yield path


def missing_tests(text):
    for path, name in re.findall(r"\b(tests/[\w/]+\.py)::(\w+)", text):
        tree = ast.parse((ROOT / path).read_text()) if (ROOT / path).exists() else ast.Module([], [])
        if name not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            yield f"{path}::{name}"


def commands(text):
    """Yield each command in a code span or a block of shell, split at &&, without variables before it."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for line in [line for block in blocks for line in block.splitlines()] + spans:
        for command in line.split("&&"):
            if found := COMMAND.fullmatch(command):
                yield shlex.split(found[1])


def wrong_commands(text):
    for words in commands(text):
        program, *rest = words
        if program == "kdjax" and (problem := wrong_arguments(rest)):
            yield f"{shlex.join(words)}: {problem}"
        elif program == "bash" and not (ROOT / rest[0]).is_file():
            yield f"{shlex.join(words)}: no such script"
        elif rest[:1] == ["-m"] and not module_runs(rest[1], rest[2:]):
            yield f"{shlex.join(words)}: no such module, path or extra"


def wrong_arguments(arguments):
    """Return what is wrong with the arguments of kdjax, an empty text if nothing is."""
    try:
        options, flags = cli._parser()[0].parse_known_args(arguments)
        if options.command not in CONFIGS:
            return f"unknown {flags}" if flags else ""
        if options.config is None:
            return "no config"
        recipe = ROOT / options.config
        if options.config.endswith(".py") and not recipe.exists():
            return "no such recipe"
        default = CONFIGS[options.command]
        known = config.load(str(recipe), type(default)) if recipe.is_file() else default
        config.override(known, flags, f"kdjax {options.command}")
    except SystemExit as stop:
        return "not understood" if stop.code else ""
    except UserError as error:
        return str(error)
    return ""


def module_runs(module, arguments):
    extras = {extra for argument in arguments for extra in re.findall(r"^\.\[(\w+)\]$", argument)}
    paths = [argument for argument in arguments if argument.startswith("tests/")]
    known = module in {"pip", "pytest"} or (ROOT / module.replace(".", "/")).with_suffix(".py").exists()
    return known and extras <= set(PROJECT["optional-dependencies"]) and all((ROOT / path).exists() for path in paths)


def loose_rows(text):
    """Yield each row of a map that neither says where its thing is nor that it is not there yet."""
    for what, *cells in rows_of(text):
        complete = "`" in cells[0] and "](" in cells[1] and "::" in cells[2]
        if not complete and cells != ["not yet", "", ""]:
            yield what


def rows_of(text):
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 4 and cells[0] != "what" and not cells[0].startswith(":"):
            yield cells


def machine_paths(text):
    """Yield what names a place on one machine, or where a package index is."""
    return [found.group() for found in MACHINE.finditer(text)]


@pytest.mark.parametrize("name", NAMES)
def test_links_resolve(name):
    page = ROOT / name
    assert list(dead_links(page.read_text(), page.parent)) == []


@pytest.mark.parametrize("name", NAMES)
def test_files_and_tests_that_are_named_exist(name):
    text = (ROOT / name).read_text()
    assert [*missing_files(text), *missing_tests(text)] == []


@pytest.mark.parametrize("name", NAMES)
def test_commands_and_their_flags_are_understood(name):
    assert list(wrong_commands((ROOT / name).read_text())) == []


def test_the_map_answers_every_line():
    text = (ROOT / "docs" / "map.md").read_text()
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    assert len(sections) == 13 and all(list(rows_of(section)) for section in sections)
    assert list(loose_rows(text)) == []


def test_the_readme_names_every_subcommand():
    text = (ROOT / "README.md").read_text()
    assert set(cli._parser()[1]) == set(re.findall(r"^\| `kdjax (\w+)", text, re.M))


def test_the_readme_has_the_two_commands_and_ci_runs_them():
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert all(f"```sh\n{command}\n```" in readme for command in (QUICKSTART, TESTS))
    assert f"bash -c '{TESTS}'" in script and "python -m pytest -m slow" in script
    smoke = QUICKSTART.replace("quickstart.py", "smoke.py")
    assert all(f" {part.strip()}" in script for part in smoke.split("&&"))


def test_the_readme_shows_what_was_measured():
    text = (ROOT / "README.md").read_text()
    assert README["render"](text) == text, "run python -m benchmarks.readme"


def test_the_changelog_names_the_version():
    newest = re.search(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest and newest[1] == kdjax.__version__ == PROJECT["version"]


def test_no_tracked_file_names_a_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    assert len(files) > 50
    contents = {file: file.read_bytes() for file in files}
    texts = {file: data.decode(errors="replace") for file, data in contents.items() if b"\0" not in data}
    assert {str(file.relative_to(ROOT)): found for file in texts if (found := machine_paths(texts[file]))} == {}


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (lambda text: dead_links(text, ROOT), "[a](kdjax/nowhere.py)"),
        (lambda text: dead_links(text, ROOT), "[a](README.md#no-such-heading)"),
        (lambda text: dead_links(text, ROOT), '<img src="docs/none.svg">'),
        (missing_files, "see `kdjax/nowhere.py`"),
        (missing_files, "see `tests/nowhere.py::test_it`"),
        (missing_tests, "`tests/test_docs.py::test_nothing`"),
        (missing_tests, "`tests/nowhere.py::test_it`"),
        (wrong_commands, "`kdjax trane configs/smoke.py`"),
        (wrong_commands, "`kdjax train --run-dir runs/x`"),
        (wrong_commands, "`kdjax train configs/nowhere.py`"),
        (wrong_commands, "`kdjax train configs/smoke.py --optim.nam muon`"),
        (wrong_commands, "`kdjax train configs/smoke.py --optim.name muons`"),
        (wrong_commands, "`kdjax train RUN --stepz 3`"),
        (wrong_commands, "`kdjax prompts RUN --bugdet 3`"),
        (wrong_commands, "`kdjax prompts configs/smoke.py`"),
        (wrong_commands, "`kdjax report RUN --inn page.html`"),
        (wrong_commands, "```sh\nA=1 kdjax evaluate\n```"),
        (wrong_commands, "```sh\nsrun kdjax train configs/smoke.py --distributed.proceses 2\n```"),
        (wrong_commands, "`python -m benchmarks.nowhere`"),
        (wrong_commands, '`python -m pip install -e ".[none]"`'),
        (wrong_commands, "`python -m pytest tests/nowhere.py`"),
        (wrong_commands, "`bash nowhere.sh`"),
        (loose_rows, "| LoRA | | | |"),
        (loose_rows, "| LoRA | not yet | [a](b.py) | |"),
        (loose_rows, "| LoRA | `kdjax fetch NAME` | [a](b.py) | tests |"),
        (machine_paths, "cd " + "/home" + "/someone"),
        (machine_paths, "pip install -i https://" + "pypi" + ".org/simple"),
    ],
)
def test_a_breach_is_seen(check, text):
    assert list(check(text))


def test_what_is_right_is_not_called_a_breach():
    text = """# A heading: two
[a](README.md) [b](#a-heading-two) [c](https://example.com/x) `kdjax/models/NAME.py` `tests/test_docs.py::anchors`
`kdjax report RUN [RUN…]` `runs/quickstart` `~/.cache` `kdjax train RUN`
```sh
JAX_NUM_CPU_DEVICES=8 kdjax train configs/smoke.py --mesh.fsdp 2 && kdjax evaluate runs/smoke
```
```text
kdjax said this
```
"""
    checks = (lambda t: dead_links(t, ROOT), missing_files, missing_tests, wrong_commands, loose_rows, machine_paths)
    assert [found for check in checks for found in check(text)] == []


def figures(objective, seed, kl, **more):
    environment = {"device": "a cpu", "platform": "cpu", "devices": 1, "commit": "abc", "jax": "0.10.2"}
    row = {"objective": objective, "seed": seed, "kl_after": kl, "agreement_after": 0.25, "perplexity_after": 1234.5}
    return row | {"eval_tokens": 100.0, "steps": 7, "held_out_sha256": "f00d", "environment": environment} | more


def results(folder, distilled=(1.0, 1.2, 1.4), cross_entropy=(2.5, 2.51), **more):
    before = {"kl_before": 9.0, "perplexity_before": 1e5, "perplexity_teacher": 12.5, "seconds": 300.0}
    rows = [figures("distilled", seed, kl, **before) for seed, kl in enumerate(distilled)]
    rows += [figures("cross_entropy", seed, kl) for seed, kl in enumerate(cross_entropy)]
    rows += [figures("unigram", 0, 5.0, **more)]
    (folder / "quickstart.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return README["quickstart"](folder)


def test_the_table_has_means_and_intervals(tmp_path):
    """Student's t at 97.5 % and two degrees of freedom is 4.303: 4.303·0.2/√3 = 0.497."""
    text = results(tmp_path)
    assert "| **student, distilled** | 1.200 ± 0.497 | 25.0 % | 1,234 |" in text
    assert "| token frequencies (unigram) | 5.000 | 25.0 % | 1,234 |" in text
    assert "| student before | 9.000 | – | 100,000 |" in text and "| teacher | – | – | 12.50 |" in text
    assert "over 3 seeds" in text and "`f00d`" in text and "jax 0.10.2" in text and "commit abc" in text


def test_the_verdict_is_said_either_way(tmp_path):
    assert "is below that of both others with their 95 % intervals apart" in results(
        tmp_path, cross_entropy=(2.5, 2.51)
    )
    assert "is not below" in results(tmp_path, cross_entropy=(1.3, 2.5))
    assert "is not below" in results(tmp_path, distilled=(4.9, 5.1), cross_entropy=(9.0, 9.1))


def test_figures_of_two_texts_make_no_table(tmp_path):
    with pytest.raises(SystemExit, match="2 held-out texts"):
        results(tmp_path, held_out_sha256="beef")


def test_what_is_not_measured_is_said_in_a_line(tmp_path):
    text = "<!-- console:begin -->\nold\n<!-- console:end -->\n<!-- quickstart:begin --><!-- quickstart:end -->"
    rendered = README["render"](text, tmp_path)
    assert rendered.count("Not measured yet") == rendered.count("Not recorded yet") == 1 and "old" not in rendered
    assert README["render"](rendered, tmp_path) == rendered


def test_missing_and_doubled_markers_are_an_error(tmp_path):
    block = "<!-- console:begin --><!-- console:end -->"
    for text in ("", block, block * 2):
        with pytest.raises(SystemExit, match="wanted 1"):
            README["render"](text, tmp_path)


def test_the_console_excerpt_leaves_out_steps_between(tmp_path):
    lines = ["fetched", *(f"step {n}/40  loss {n}" for n in range(1, 41)), "step 40 held out: KL 1 ", "report: x"]
    (tmp_path / "quickstart.txt").write_text("\n".join(lines))
    shown = README["console"](tmp_path).splitlines()
    assert shown == ["```text", *lines[:4], "…", lines[40], "step 40 held out: KL 1", "report: x", "```"]
