"""A plan beside the run that it is of: the same step, the same bytes; what it advises; what it refuses."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
import tiny_run

from benchmarks import harness, plans
from kdjax import build
from kdjax import config as configs
from kdjax.cli import main
from kdjax.errors import UserError
from kdjax.models import LazyTensor, Model
from kdjax.models.config import Lora
from kdjax.models.known import CONFIGS, known_architecture
from kdjax.plan import measure as measuring
from kdjax.plan.abstract import abstract_batch, abstract_frozen, abstract_job, unread
from kdjax.plan.chips import CHIPS, Chip, machine
from kdjax.plan.estimate import sizes_of
from kdjax.plan.measure import candidates, measure, rank, sweep
from kdjax.plan.page import markdown, plan_table, sweep_table
from kdjax.sharding import MeshConfig, TeacherMeshConfig

ROOT = Path(__file__).parents[2]
LARGE = ("llama31_8b_to_1b_v5e256", "qwen3_8b_to_0p6b_h100x8", "smollm2_1p7b_to_360m_1gpu")
PARAMETERS = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "smollm2-135m-instruct": 134_515_008,
    "all-minilm-l6-v2": 22_565_376,
}
"""As the hub counts the weights of each; of all-minilm-l6-v2 without a pooler, which kdjax does not use."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny recipe over eight devices."""
    path = tiny_run.write_recipe(tmp_path_factory.mktemp("plan"))
    return replace(configs.load(str(path)), mesh=MeshConfig(data=1, fsdp=8))


@pytest.fixture(scope="module")
def estimated(tiny):
    return measure(tiny, machine("cpu:8"), compiles=False)


def on_first_device(tree):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.slow
def test_parameters_and_moments_are_those_that_a_device_of_a_run_holds(tiny, estimated):
    job = build.build(tiny)
    state, memory = job.start(), estimated["memory"]
    assert memory["student"] == on_first_device(state.params) > 0
    assert memory["optimizer"] == on_first_device(state.opt_state) > 0
    assert memory["teacher"] == on_first_device(job.frozen()["teacher"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(placement="pmap")])
def test_it_plans_the_step_that_training_runs(tiny, mesh):
    config = replace(tiny, mesh=mesh)
    real, planned = build.build(config), abstract_job(config, jax.devices())
    batch = real.place.put_batch(next(real.data.train(None, prefetch=0))[0])
    trained = real.step.lower(real.abstract_state, real.frozen(), batch).as_text()
    assert trained == planned.step.lower(*arguments(planned)).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [4, -1])
def test_it_plans_what_a_teacher_apart_runs(tiny, devices):
    mesh = MeshConfig(fsdp=2) if devices > 0 else MeshConfig(fsdp=4)
    config = replace(tiny, mesh=mesh, teacher_mesh=TeacherMeshConfig(devices=devices, tensor=2))
    real, planned = build.build(config), abstract_job(config, jax.devices())
    batch = real.place.put_batch(next(real.data.train(None, prefetch=0))[0])
    trained = real.lowered(real.abstract_state, real.frozen(), batch)
    assert len(trained) == 2
    for ours, theirs in zip(planned.lowered(*arguments(planned)), trained, strict=True):
        assert ours.as_text() == theirs.as_text()


def test_a_teacher_apart_is_planned_on_its_own_devices(tiny):
    """Each side has its own model's FLOPs on its own devices; the longer counts, and both where they share devices."""
    both = replace(tiny, mesh=MeshConfig(), batch_size=24, microbatches=1)
    within = measure(both, machine("gpu:8xH100"), compiles=False)
    own = replace(both, teacher_mesh=TeacherMeshConfig(devices=2, tensor=2, data=1))
    plan = measure(own, machine("gpu:8xH100"), compiles=False)
    assert plan["mesh"]["data"] == 6 and plan["devices"] == 8
    apart, seconds = plan["apart"], plan["estimate"]["seconds"]
    assert apart["devices"] == apart["mesh"]["tensor"] == 2 and within["apart"] is None
    assert apart["seconds"]["compute"] == pytest.approx(within["flops"]["teacher"] / 2 / CHIPS["H100"].float32)
    assert seconds["compute"] < within["estimate"]["seconds"]["compute"] * 8 / 6
    assert seconds["teacher"] == max(apart["seconds"].values())
    assert plan["estimate"]["at_best"]["seconds"] == max(seconds.values())
    assert within["memory"]["teacher"] > apart["memory"]["teacher"] > 0.5 * within["memory"]["teacher"]
    assert plan["memory"]["teacher"] == 264 * 16 * 4  # its head
    shared = replace(both, teacher_mesh=TeacherMeshConfig(devices=-1, data=1, tensor=8))
    one = measure(shared, machine("gpu:8xH100"), compiles=False)["estimate"]
    assert one["at_best"]["seconds"] > one["seconds"]["teacher"] + one["seconds"]["compute"]
    assert "teacher apart, on devices" in render(plan_table(plan)) and "apart" not in render(plan_table(within))


def test_what_lies_in_the_hosts_memory_is_counted_there(tiny):
    whole, there = (
        measure(replace(tiny, teacher=replace(tiny.teacher, offload=offload)), machine("gpu:8xH100"), compiles=False)
        for offload in (False, True)
    )
    assert whole["memory"]["host"] == 0 < there["memory"]["host"]
    assert there["memory"]["host"] + there["memory"]["teacher"] == whole["memory"]["teacher"]
    assert there["memory"]["peak_estimated"] == whole["memory"]["peak_estimated"] - there["memory"]["host"]
    assert any("hosts' memory" in note for note in there["notes"]) and "host's memory" in render(plan_table(there))


def arguments(job):
    return job.abstract_state, abstract_frozen(job), abstract_batch(job)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_it_plans_adapters_and_a_quantised_teacher_as_training_runs_them(quantize):
    """Of a model that is known by name, whose real files are read here."""
    config = configs.load(str(ROOT / "configs" / "quickstart.py"))
    student = replace(config.student, lora=Lora(rank=4), keep_layers=(0, 29), dtype="bfloat16")
    teacher = replace(config.teacher, quantize=quantize, keep_layers=(0, 1), dtype="bfloat16")
    config = replace(config, student=replace(student, keep_layers=(1,)), teacher=teacher, batch_size=8)
    real, planned = build.build(config), abstract_job(config, jax.devices())
    batch = real.place.put_batch(next(real.data.train(None, prefetch=0))[0])
    trained = real.step.lower(real.abstract_state, real.frozen(), batch).as_text()
    assert trained == planned.step.lower(*arguments(planned)).as_text()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_known_architecture_has_the_parameters_of_the_real_one(name):
    shapes = jax.eval_shape(Model(known_architecture(name)).init, jax.random.key(0))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == PARAMETERS[name]


def test_no_weight_of_a_known_model_is_read():
    leaf = jax.tree.leaves(unread("Qwen/Qwen3-8B").tensors, is_leaf=lambda x: isinstance(x, LazyTensor))[0]
    with pytest.raises(RuntimeError, match="reads no weight"):
        leaf.all()


def test_what_is_not_known_is_opened_and_what_is_not_there_is_one_line():
    with pytest.raises(UserError, match="no model 'nothing'"):
        unread("nothing")


def test_of_a_hub_id_that_is_not_listed_the_config_alone_is_got(monkeypatch, tmp_path, capsys):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def give(name, file, local_dir):
        asked.append((name, file))
        path = Path(local_dir) / file
        path.write_text(json.dumps(CONFIGS["Qwen/Qwen3-0.6B"] | {"num_hidden_layers": 3}))
        return str(path)

    monkeypatch.setenv("KDJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "hf_hub_download", give)
    assert unread("some/model").config == replace(known_architecture("Qwen/Qwen3-0.6B"), layers=3)
    assert asked == [("some/model", "config.json")] and list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err.count("\n") == 1

    def refuse(name, file, local_dir):
        raise RuntimeError("no network\nat all")

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(UserError, match=r"does not give the config.json of some/model \(no network\)$"):
        unread("some/model")


@pytest.fixture
def small_chip(monkeypatch):
    """A chip whose memory holds next to nothing, and whose rates are round."""

    def set_memory(memory):
        monkeypatch.setitem(CHIPS, "v5e", Chip("tpu", memory, 1e9, 5e8, 1e9, 1e9, 2))
        monkeypatch.setattr(measuring, "COMPILERS", {"tpu": "a module that is not there", "cpu": "jaxlib"})
        return machine("v5e:2x4")

    return set_memory


def test_without_a_compiler_it_is_estimated_and_says_so(tiny, small_chip):
    found = measure(tiny, small_chip(1e12), price=2.0)
    assert found["by"] == "estimate" and found["memory"]["fits"] and not found["advice"]
    assert any("plan-tpu" in note for note in found["notes"])
    seconds, flops = found["estimate"]["seconds"], found["flops"]
    assert seconds["compute"] == pytest.approx(flops["done"] / 8 / 5e8)  # both models are float32
    assert "network" not in seconds
    apart = found["estimate"]["without_overlap"]
    assert apart["seconds"] == pytest.approx(sum(seconds.values()))
    assert found["estimate"]["at_best"]["seconds"] == max(seconds.values())
    tokens = 16 * 32
    assert apart["tokens_per_second"] == pytest.approx(tokens / apart["seconds"])
    assert apart["mfu"] == pytest.approx(flops["useful"] / apart["seconds"] / 8 / 5e8)
    assert apart["dollars_per_billion_tokens"] == pytest.approx(8 * 2 / 3600 * apart["seconds"] * 1e9 / tokens)


def test_no_price_no_cost(tiny, small_chip):
    assert "dollars_per_billion_tokens" not in measure(tiny, small_chip(1e12))["estimate"]["at_best"]


@pytest.mark.parametrize(
    ("change", "said", "unsaid"),
    [
        ({}, "student.remat full", "mesh.fsdp"),
        ({"mesh": MeshConfig(data=8)}, "mesh.fsdp 8 with mesh.data 1", "pmap"),
        ({"mesh": MeshConfig(placement="pmap")}, "mesh.placement to jit", "mesh.fsdp 8"),
        ({"batch_size": 64}, "raise microbatches, to 4", "lower data.sequence_length"),
        ({"batch_size": 16}, "lower data.sequence_length", "raise microbatches"),
        ({"batch_size": 16}, "split rows: mesh.context", "lower batch_size"),
        ({}, "mesh.tensor 2", "objective.implementation"),
    ],
)
def test_what_does_not_fit_is_told_what_to_change(tiny, small_chip, change, said, unsaid):
    found = measure(replace(tiny, **change), small_chip(20_000))
    assert found["memory"]["fits"] is False
    assert any(said in line for line in found["advice"]), found["advice"]
    assert not any(unsaid in line for line in found["advice"]), found["advice"]


def test_advice_leaves_out_what_is_done_already(tiny, small_chip):
    done = replace(tiny, student=replace(tiny.student, remat="full", dtype="bfloat16"))
    found = measure(done, small_chip(20_000))["advice"]
    assert found and not any("remat" in line or "student.dtype" in line for line in found)


@pytest.mark.parametrize(
    ("said", "peak"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error.\nRan out of memory. Used 20.5G of 15.75G hbm.", 20.5),
        (
            "RESOURCE_EXHAUSTED: Ran out, the total memory required for HLO temporaries (196.5G) exceeds (15.75G).",
            196.5,
        ),
        ("RESOURCE_EXHAUSTED: no figure", None),
    ],
)
def test_what_a_compiler_refuses_does_not_fit(tiny, monkeypatch, said, peak):
    def refuse(self):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    found = measure(replace(tiny, mesh=MeshConfig()), replace(machine("cpu:8"), name="a machine"))
    memory = found["memory"]
    assert memory["refused"] in said and memory["peak"] == (None if peak is None else int(peak * 2**30))
    assert found["collectives"] is None and any("network" in note for note in found["notes"])
    assert memory["refused"] in render(plan_table(found))


def test_candidates_fill_the_machine_each_in_its_own_way(tiny):
    found = [(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, c.microbatches) for c in candidates(tiny, 8)]
    assert len(set(found)) == len(found) == 4 * 10
    assert {data * fsdp * tensor for data, fsdp, tensor, _ in found} == {8}
    over_context = [c.mesh for c in candidates(replace(tiny, mesh=MeshConfig(context=2)), 8)]
    assert {mesh.data * mesh.fsdp * mesh.tensor * mesh.context for mesh in over_context} == {8}
    assert {mesh.context for mesh in over_context} == {2} and len(over_context) == 4 * 6


def test_what_training_refuses_of_a_context_is_not_planned(tiny):
    with pytest.raises(UserError, match="attention heads, which do not split over 8 devices"):
        abstract_job(replace(tiny, mesh=MeshConfig(context=8)), jax.devices("cpu")[:8])


def test_each_device_of_a_row_has_its_part_of_the_tokens(tiny):
    def tokens(mesh):
        return sizes_of(abstract_job(replace(tiny, mesh=mesh), jax.devices("cpu")[:8]), "cpu").tokens

    assert tokens(MeshConfig(context=2)) == tokens(MeshConfig()) == tokens(MeshConfig(tensor=2)) // 2


@pytest.mark.slow
def test_a_sweep_ranks_what_fits_by_speed(tiny, small_chip):
    found = sweep(replace(tiny, batch_size=32), small_chip(2e6), None, 2)
    assert [rank(plan) for plan in found] == sorted(rank(plan) for plan in found)
    assert len({(json.dumps(plan["mesh"]), plan["microbatches"]) for plan in found}) == len(found) > 10
    assert found[0]["memory"]["fits"] is not False
    assert render(sweep_table(found)).count("\n") > 10


def test_a_sweep_of_a_batch_that_splits_nowhere_is_one_line(tiny, small_chip, monkeypatch):
    meshes = candidates(tiny, 8)
    monkeypatch.setattr(
        measuring,
        "candidates",
        lambda config, devices: [replace(one, batch_size=config.batch_size) for one in meshes if one.mesh.tensor == 1],
    )
    with pytest.raises(UserError, match="no mesh of v5e:2x4 splits batch_size 3"):
        sweep(replace(tiny, batch_size=3), small_chip(1e12), None, 1)


def render(table):
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_console_and_page_have_the_same_rows(estimated):
    shown, page = render(plan_table(estimated)), markdown("A title", [estimated, estimated])
    for words in ("student, a device", "peak, a device", "fsdp 8", "FLOPs of a step: teacher"):
        assert words in shown and words in page
    assert page.startswith("# A title\n") and page.count("| cpu:8 |") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which machine"),
        (["--topology", "v5x:4x4"], "did you mean"),
        (["--topology", "cpu:8", "--price", "-1"], "--price is -1"),
        (["--topology", "cpu:8", "--sweep", "-1"], "--sweep is -1"),
        (["--topology", "cpu:8", "--student.remat", "most"], "student.remat"),
        (["--topology", "cpu:8", "--studnt.remat", "full"], "unknown flag --studnt.remat"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(subprocess, "run", None)
    assert main(["plan", str(ROOT / "configs" / "smoke.py"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err


def test_a_config_of_another_job_is_one_line(capsys):
    assert main(["plan", str(ROOT / "configs" / "prompt_search.py"), "--topology", "cpu:8"]) == 2
    assert "wanted a kdjax.config.Config" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_plans_in_a_process_of_its_own(tmp_path):
    tiny_run.write_recipe(tmp_path)
    fsdp = ("--mesh.data", "1", "--mesh.fsdp", "8")
    done = tiny_run.run(tmp_path, "plan", "tiny.py", "--topology", "cpu:8", *fsdp, "--json", "--report", "a/plan.md")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["by"] == "compiler" and found["mesh"]["fsdp"] == 8 and found["estimate"] == {}
    assert found["memory"]["peak"] > found["memory"]["student"] + found["memory"]["optimizer"]
    kinds = {(row["kind"], row["axis"]) for row in found["collectives"]}
    assert kinds == {("all-gather", "fsdp"), ("all-reduce", "fsdp")}
    assert "peak, a device" in (tmp_path / "a" / "plan.md").read_text()
    bad = tiny_run.run(tmp_path, "plan", "tiny.py", "--topology", "cpu:8", "--mesh.data", "3")
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "does not fill 8 devices" in bad.stderr


@pytest.mark.slow
def test_a_sweep_compiles_the_best(tmp_path):
    tiny_run.write_recipe(tmp_path)
    done = tiny_run.run(tmp_path, "plan", "tiny.py", "--topology", "cpu:2", "--sweep", "1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["plans"]
    assert [plan["by"] for plan in found].count("compiler") == 1


SCRIPT = """
import json, sys
import jax
from kdjax import config
from kdjax.plan.chips import CHIPS, machine
from kdjax.plan.estimate import sizes_of
from kdjax.plan.measure import measure
wanted = machine(sys.argv[2])
jax.config.update("jax_num_cpu_devices", wanted.device_count)
print(json.dumps(measure(config.load(sys.argv[1]), wanted, 2.0, compiles=False)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_large_recipe_is_planned_at_its_real_size(name):
    topology = {"v5e256": "v5e:16x16", "h100x8": "gpu:8xH100", "1gpu": "gpu:1xH100"}[name.rsplit("_", 1)[1]]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT / "configs" / f"{name}.py"), topology],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["memory"]["fits"] and 0 < found["estimate"]["without_overlap"]["mfu"] < 1
    assert found["parameters"]["teacher"] > 4 * found["parameters"]["student"] > 10**9


GROWTH = """
import json, sys
import jax
from benchmarks.harness import resident_growth
from kdjax import build, config
from kdjax.plan.chips import CHIPS, machine
from kdjax.plan.estimate import sizes_of
from kdjax.plan.measure import measure
asked = config.load(sys.argv[1])
work = measure(asked, machine("cpu:1"))["memory"]["work"]
job = build.build(asked)
frozen, state, stream = job.frozen(), job.start(), job.data.train(None, prefetch=0)
batches = [job.place.put_batch(next(stream)[0]) for _ in range(3)]
step = job.step.lower(state, frozen, batches[0]).compile()
def steps():
    global state
    for batch in batches:
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))
print(json.dumps({"work": work, "grown": [resident_growth(steps) for _ in range(12)]}))
"""


@pytest.mark.slow
def test_the_peak_is_what_a_process_grows_by(tmp_path):
    """Over three steps, models and batches being there already; the least of twelve times."""
    sizes = {"vocab_size=264": "vocab_size=4096", "width=16": "width=128", "head_width=8": "head_width=64"}
    text = tiny_run.RECIPE
    for old, new in (sizes | {"mlp_width=32": "mlp_width=256", "sequence_length=32": "sequence_length=256"}).items():
        text = text.replace(old, new)
    path = tiny_run.write_recipe(tmp_path, text)
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["work"] > 50e6
    assert min(found["grown"]) == pytest.approx(found["work"], rel=0.1)


def test_committed_plans_are_those_of_the_results_and_recipes_name_them():
    rows = harness.read(plans.RESULTS)
    for name in LARGE:
        page = plans.PAGES / f"{name}.md"
        assert page.read_text() == plans.page(name, rows), "run python -m benchmarks.plans"
        assert f"planned: docs/plans/{page.name}" in (ROOT / "configs" / f"{name}.py").read_text()
    assert tuple(plans.CASES) == LARGE
