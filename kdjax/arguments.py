"""The arguments of the commands that have many."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_config(command: argparse.ArgumentParser) -> None:
    """Add a config and where to write; further flags are the config's own."""
    name = command.prog
    command.usage = f"{name} CONFIG [--run-dir DIR] [--FIELD VALUE ...]"
    command.epilog = f"`{name} CONFIG --help` lists the fields of the config with their values."
    command.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        help="a recipe (configs/NAME.py), a saved config.json, or a run directory to go on with",
    )
    command.add_argument(
        "--run-dir", metavar="DIR", type=Path, help="where everything is written; by default runs/NAME_OF_CONFIG"
    )


def _add_recipe(command: argparse.ArgumentParser) -> None:
    """Add a config that is not a run's to go on with."""
    command.epilog = f"`{command.prog} CONFIG --help` lists the fields of the config with their values."
    command.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        help="a recipe (configs/NAME.py), a saved config.json, or a run directory",
    )


def add_label(command: argparse.ArgumentParser) -> None:
    """Add a config and where its cache is written; further flags are the config's own."""
    command.usage = f"{command.prog} CONFIG OUT [--label.kind KIND] [--FIELD VALUE ...]"
    _add_recipe(command)
    command.add_argument("out", metavar="OUT", nargs="?", type=Path, help="the cache's own directory")
    command.set_defaults(run_dir=None)


def add_cache(command: argparse.ArgumentParser) -> None:
    """Add what is looked at, and how closely."""
    command.add_argument("action", choices=("inspect",), metavar="inspect")
    command.add_argument("directory", type=Path, metavar="DIR", help="that `kdjax label` has written")
    command.add_argument(
        "--verify", type=int, default=0, metavar="N", help="ask the teacher about the first N batches anew, and compare"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def add_launch(command: argparse.ArgumentParser) -> None:
    """Add how a process finds the others of its job; no part of the config, since it differs between them."""
    add = command.add_argument_group("several processes", "start each with one of two:").add_argument
    add(
        "--distributed.auto",
        dest="auto",
        action="store_true",
        help="let Slurm, Kubernetes, Cloud TPU or Open MPI tell the rest",
    )
    add("--distributed.coordinator", dest="coordinator", default="", metavar="HOST:PORT", help="of process 0")
    add(
        "--distributed.processes",
        dest="processes",
        type=int,
        default=0,
        metavar="N",
        help="how many there must be, or the run does not start",
    )
    add("--distributed.process", dest="process", type=int, default=-1, metavar="I", help="which one this is, from 0")
    add(
        "--distributed.timeout",
        dest="timeout",
        type=int,
        default=300,
        metavar="SECONDS",
        help="to wait for the others (default: %(default)s)",
    )


def add_profile(command: argparse.ArgumentParser) -> None:
    """Add which steps are traced; no part of the config, since it changes nothing that a run computes."""
    command.add_argument(
        "--profile.steps",
        dest="profile",
        default="",
        metavar="FIRST:LAST",
        help="trace these steps into the run's directory profile/, as 10:15, and say which share of them the teacher, "
        "the student, the loss and the optimiser take; open it with Perfetto or xprof",
    )


def add_plan(command: argparse.ArgumentParser) -> None:
    """Add a config, the machine, and how the plan is shown; further flags are the config's own."""
    command.usage = f"{command.prog} CONFIG --topology MACHINE [--FIELD VALUE ...]"
    _add_recipe(command)
    command.add_argument(
        "--topology",
        metavar="MACHINE",
        help="TPUs (v4, v5e, v5p, v6e, v7x) as v5e:16x16 or v5p:4x4x8, up to 8 GPUs of a node as gpu:8xH100 or "
        "gpu:1xH200, or cpu:8",
    )
    command.add_argument("--price", type=float, metavar="DOLLARS", help="of a chip and an hour; with it cost is said")
    command.add_argument(
        "--sweep",
        type=int,
        nargs="?",
        const=3,
        default=0,
        metavar="N",
        help="try meshes and microbatches, and rank them; the best are compiled until N of them fit (default: 3)",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    command.add_argument("--report", type=Path, metavar="PATH.md", help="write the plan as a markdown page too")
    command.set_defaults(run_dir=None)


def add_generate(command: argparse.ArgumentParser) -> None:
    """Add what is continued, and how."""
    command.epilog = "The text of one prompt is shown as it comes; of several, a line of JSON each, in their order."
    command.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    command.add_argument(
        "--prompts", type=Path, metavar="FILE", help='one a line; of a .jsonl file the field "prompt" of each line'
    )
    command.add_argument(
        "--compress", default="", metavar="TEXT", help="compress TEXT, or @FILE, to the run's gist before every prompt"
    )
    command.add_argument("--chat", action="store_true", help="a prompt is a user's turn in the chat template")
    command.add_argument("--json", action="store_true", help="a line of JSON for a single prompt too")
    command.add_argument("--max-new-tokens", type=int, default=100, help="default: %(default)s")
    command.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    command.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    command.add_argument("--top-k", type=int, default=0, help="choose among so many tokens; 0: all (default)")
    command.add_argument("--top-p", type=float, default=1.0, help="among those that hold this probability together")
    command.add_argument("--min-p", type=float, default=0.0, help="among those of this share of the likeliest's")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--batch-size", type=int, default=16, help="prompts at once (default: %(default)s)")
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: %(default)s)"
    )


def add_student(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the command that cuts students."""
    command.add_argument("teacher", metavar="TEACHER", help="a directory, run, .gguf file, known name or hub id")
    command.add_argument("out", type=Path, metavar="OUT", help="a new directory in Hugging Face's format")
    command.add_argument("--layers", type=int, metavar="N", help="layers to keep")
    command.add_argument("--keep-layers", type=int, nargs="+", default=[], metavar="I", help="which ones, from 0")
    command.add_argument(
        "--encoder-layers", type=int, metavar="N", help="layers to keep of the encoder beside a decoder"
    )
    command.add_argument(
        "--choose",
        choices=("even", "ends", "importance"),
        default="even",
        help="how --layers and --encoder-layers choose: spread with the first and last, the first and last halves, or "
        "by how much each changes its input (default: %(default)s)",
    )
    command.add_argument("--mlp", type=int, metavar="N", help="neurons of each layer's mlp to keep")
    command.add_argument("--heads", type=int, metavar="N", help="query heads to keep, as many of every group")
    command.add_argument("--kv-heads", type=int, metavar="N", help="key/value heads to keep, with their query heads")
    command.add_argument("--width", type=int, metavar="N", help="channels of the embedding to keep")
    command.add_argument(
        "--vocab",
        type=int,
        metavar="N",
        help="tokens of a byte-pair tokenizer to keep, the commonest in the text. A student is distilled by a teacher "
        "of the same tokens: first cut the teacher alone (kdjax student TEACHER SMALLER --vocab N), then students out "
        "of SMALLER",
    )
    command.add_argument("--dense", action="store_true", help="of each layer's experts keep the most used as its mlp")
    command.add_argument(
        "--sources", nargs="+", default=["python_docs"], metavar="SOURCE", help="text, as --data.sources of train"
    )
    command.add_argument("--rows", type=int, default=32, help="of text to measure on (default: %(default)s)")
    command.add_argument("--sequence-length", type=int, default=256, help="tokens of a row (default: %(default)s)")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the measuring and of the weights written (default: %(default)s)",
    )
