"""Where the time goes: traces by region, what was compiled and what was kept, FLOPs against a chip's peak."""

import gzip
import json
from types import SimpleNamespace

import pytest
from tiny_run import home, rows, run  # noqa: F401 (home is a fixture)

from kdjax.errors import UserError
from kdjax.plan.flops import Flops
from kdjax.profile import REGIONS, Span, shares, span
from kdjax.utilisation import peak, teachers_share, utilisation

HLO = """
%body (x: f32[4]) -> f32[4] {
  %dot.1 = f32[4]{0} dot(%a, %b), metadata={op_name="jit(step)/while/body/jvp(student)/layers/dot_general"}
  ROOT %fusion.2 = f32[4]{0} fusion(%dot.1), kind=kLoop, metadata={op_name="jit(step)/while/body/teacher/mlp/dot"}
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %while.3 = f32[4]{0} while(%x), body=%body, metadata={op_name="jit(step)/while"}
  %custom-call.4 = f32[4]{0} custom-call(%x), metadata={op_name="jit(step)/transpose(jvp(loss))/student/exp"}
  ROOT %add.5 = f32[4]{0} add(%x, %x), metadata={op_name="jit(step)/optimizer/add"}
}
"""


def event(name, start, end, **stats):
    return SimpleNamespace(name=name, start_ns=start, duration_ns=end - start, stats=stats.items())


def plane(name, *lines):
    return SimpleNamespace(name=name, lines=[SimpleNamespace(events=events) for events in lines])


def test_a_regions_share_is_the_time_of_its_operations_without_those_within():
    one = [
        event("ThunkExecutor::Execute", 0, 100),
        event("while.3", 0, 60, hlo_op="while.3"),
        event("a kernel", 5, 25, hlo_op="dot.1"),
        event("%fusion.2 = f32[4]{0} fusion(%dot.1)", 30, 60),
        event("custom-call.4", 60, 90),
        event("add.5", 90, 95),
        event("of another module", 95, 99, hlo_op="dot.77"),
    ]
    other = [event("dot.1", 0, 20)]
    found = shares(SimpleNamespace(planes=[plane("/host:CPU", one, other)]), HLO)
    total = 20 + 20 + 30 + 30 + 5 + 10
    assert found == {
        "teacher": 30 / total,
        "student": 40 / total,
        "loss": 30 / total,
        "optimizer": 5 / total,
        "other": 10 / total,
    }


def test_where_devices_have_planes_the_hosts_do_not_count():
    planes = [plane("/host:CPU", [event("dot.1", 0, 50)]), plane("/device:GPU:0", [event("add.5", 0, 10)])]
    assert shares(SimpleNamespace(planes=planes), HLO)["optimizer"] == 1
    assert shares(SimpleNamespace(planes=[plane("/host:CPU", [event("x", 0, 9)])]), HLO) == {}


def test_steps_to_trace_are_two_numbers():
    assert span("10:15") == Span(10, 15) and span("3:3") == Span(3, 3) and span("") is None
    for wrong in ("10", "0:3", "5:4", "1:2:3", "-1:2", "a:b", "1: 2"):
        with pytest.raises(UserError, match="profile.steps is .* as 10:15"):
            span(wrong)


@pytest.fixture(scope="module")
def traced(home):  # noqa: F811
    """Two processes one after the other that do the same run, with nothing compiled before the first."""
    runs = []
    for name in ("cold", "warm"):
        arguments = ("train", "tiny.py", "--run-dir", name, "--profile.steps", "2:3")
        done = run(home, *arguments, KDJAX_CACHE=str(home / "kept"), JAX_COMPILATION_CACHE_DIR=None)
        assert done.returncode == 0, done.stderr
        runs.append((home / name, done))
    return runs


@pytest.mark.slow
def test_a_trace_opens_and_says_what_takes_the_time(traced):
    for directory, done in traced:
        (perfetto,) = (directory / "profile").rglob("perfetto_trace.json.gz")
        names = [entry.get("name", "") for entry in json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]]
        assert names.count("step") == 2
        found = json.loads((directory / "summary.json").read_text())["profile"]
        assert set(found) == {*REGIONS, "other"} and sum(found.values()) == pytest.approx(1)
        assert min(found["teacher"], found["student"], found["loss"]) > 0.02 and found["optimizer"] > 0
        assert found["other"] < 0.3
        assert f"{directory.name}/profile holds the trace, up to step 3; of the devices' time: teacher" in done.stderr


@pytest.mark.slow
def test_what_one_process_compiles_the_next_one_finds(home, traced):  # noqa: F811
    cold, warm = (json.loads((directory / "summary.json").read_text()) for directory, _ in traced)
    assert cold["compiled_cached"] <= 2 and list((home / "kept" / "compiled").iterdir())  # two that are the same
    assert warm["compiled_cached"] == warm["compiled_programs"] == cold["compiled_programs"] > 5
    assert 0 < warm["compiled_seconds"] < cold["compiled_seconds"] < cold["first_step_seconds"]
    assert rows(traced[0][0]) == rows(traced[1][0])
    assert rows(traced[0][0], times=True)[1]["first_step_seconds"] == cold["first_step_seconds"]
    assert (
        f"compiling {cold['compiled_programs']:.0f} programs, {cold['compiled_cached']:.0f} of" in traced[0][1].stdout
    )


@pytest.mark.parametrize(("steps", "why"), [("9:8", "as 10:15"), ("3:5", "goes from step 1 to 4"), ("0:2", "from 1")])
def test_steps_that_a_run_has_not_are_refused(home, steps, why):  # noqa: F811
    done = run(home, "train", "tiny.py", "--run-dir", "refused", "--profile.steps", steps)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and why in done.stderr


def job(kind, devices=4, dtype="bfloat16"):
    return SimpleNamespace(
        config=SimpleNamespace(batch_size=8, data=SimpleNamespace(sequence_length=1000)),
        devices=[SimpleNamespace(device_kind=kind)] * devices,
        student=SimpleNamespace(spec=SimpleNamespace(dtype=dtype)),
    )


def test_utilisation_is_flops_against_the_peak_of_all_chips():
    flops = Flops(teacher=4e15, student=3e15, recompute=1e15, loss=2e15, useful=8e15)
    found = utilisation(job("NVIDIA H100 80GB HBM3"), flops, 800.0)  # a step takes 10 s
    assert found["model_flops_per_second"] == pytest.approx(2e14)
    assert found["mfu"] == pytest.approx(2e14 / 989.4e12) and found["hfu"] == pytest.approx(2.5e14 / 989.4e12)
    assert teachers_share(flops) == 0.4
    assert utilisation(job("cpu"), flops, 800.0).keys() == {"model_flops_per_second"}
    in_float32 = utilisation(job("NVIDIA H100 80GB HBM3", dtype="float32"), flops, 800.0)
    assert in_float32["mfu"] == pytest.approx(2 * found["mfu"])


def test_peaks_are_those_of_a_device_as_jax_names_it():
    kinds = {"TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12, "TPU v6 lite": 918e12}
    kinds |= {"TPU7x": 2307e12 / 2, "NVIDIA H200": 989.4e12, "NVIDIA H100 PCIe": 0, "cpu": 0}
    assert {kind: peak(kind, "bfloat16") for kind in kinds} == pytest.approx(kinds)
