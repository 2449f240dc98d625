"""Compiled programs are found again by the next process; a folder that cannot be used costs one line."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from inranker_jax import compilation_cache

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

PROGRAM = """
import sys
import jax
from inranker_jax import compilation_cache

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
folder = compilation_cache.enable()
assert compilation_cache.enable() == folder
assert not jax._src.xla_bridge.backends_are_initialized(), "enable() comes before jax.distributed.initialize"
print(folder)
print(jax.jit(lambda x: (x * 3 + 1).sum())(jax.numpy.arange(4.0)))
print(sum(event.endswith("/cache_hits") for event in hits), sum(event.endswith("/cache_misses") for event in hits))
"""


def run(environment: dict[str, str], program: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    dropped = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", compilation_cache.VARIABLE)
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def counts(done: subprocess.CompletedProcess[str]) -> tuple[str, int, int]:
    """The folder, how many programs were found, and how many were compiled and kept."""
    assert done.returncode == 0, done.stderr
    folder, total, numbers = done.stdout.splitlines()
    assert total == "22.0"
    hits, misses = map(int, numbers.split())
    return folder, hits, misses


def test_the_second_process_compiles_nothing(tmp_path: pathlib.Path) -> None:
    first, second = (run({"XDG_CACHE_HOME": str(tmp_path)}) for _ in range(2))
    folder, hits, kept = counts(first)
    assert pathlib.Path(folder).parent == tmp_path / "inranker_jax" / "xla"
    assert hits == 0 < kept
    assert counts(second) == (folder, kept, 0)
    assert first.stderr == second.stderr == ""
    assert pathlib.Path(folder).stat().st_mode & 0o777 == 0o700


def test_torn_programs_are_compiled_again(tmp_path: pathlib.Path) -> None:
    """A full disk or a kill leaves parts of files, with or without the time of the last use."""
    environment = {compilation_cache.VARIABLE: str(tmp_path)}
    folder, _, kept = counts(run(environment))
    programs = sorted(pathlib.Path(folder).glob("*-cache"))
    assert len(programs) == kept
    for program in programs:
        program.write_bytes(program.read_bytes()[:40])
    again = run(environment)
    assert counts(again) == (folder, 0, kept)
    assert again.stderr == ""
    for program in programs:  # without the time of its last use JAX could not even look for the oldest
        program.write_bytes(b"")
        program.with_name(program.name.replace("-cache", "-atime")).unlink()
    assert counts(run(environment)) == (folder, 0, kept)
    assert counts(run(environment)) == (folder, kept, 0)


def test_two_processes_at_once(tmp_path: pathlib.Path) -> None:
    environment = {**os.environ, compilation_cache.VARIABLE: str(tmp_path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM], cwd=REPOSITORY, env=environment, stdout=-1, stderr=-1, text=True
        )
        for _ in range(2)
    ]
    for process in started:
        out, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (0, "")
        assert "22.0" in out


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({compilation_cache.VARIABLE: "off"}, "None"),
        ({compilation_cache.VARIABLE: "off", "JAX_ENABLE_COMPILATION_CACHE": "true"}, "None"),
        ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, "None"),
        ({"JAX_COMPILATION_CACHE_DIR": "{tmp}/mine"}, "{tmp}/mine"),
        (
            {"JAX_COMPILATION_CACHE_DIR": "{tmp}/mine", compilation_cache.VARIABLE: "{tmp}/ours"},
            "{tmp}/ours/",
        ),
        ({"XDG_CACHE_HOME": "relative", "HOME": "{tmp}"}, "{tmp}/.cache/inranker_jax/xla/"),
        ({compilation_cache.VARIABLE: "~/here", "HOME": "{tmp}"}, "{tmp}/here/"),
    ],
)
def test_which_folder(environment: dict[str, str], expected: str, tmp_path: pathlib.Path) -> None:
    done = run({name: value.format(tmp=tmp_path) for name, value in environment.items()})
    folder, _, kept = counts(done)
    assert done.stderr == ""
    wanted = expected.format(tmp=tmp_path)
    assert folder.startswith(wanted) if wanted.endswith("/") else folder == wanted
    stored = list(tmp_path.rglob("*-cache"))
    assert len(stored) == (0 if folder == "None" else kept)


@pytest.mark.parametrize("place", ["/proc/nothing", "{tmp}/file/folder"])
def test_a_folder_that_cannot_be_written_costs_one_line(place: str, tmp_path: pathlib.Path) -> None:
    """/proc stands for the read-only home of a container: not even root can make a folder there."""
    (tmp_path / "file").touch()
    done = run({compilation_cache.VARIABLE: place.format(tmp=tmp_path)})
    assert counts(done) == ("None", 0, 0)
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: compiled programs are not kept (")
    assert line.endswith("Set INRANKER_JAX_COMPILATION_CACHE to a folder that can be written, or to off.")


def test_a_full_disk_costs_one_line(tmp_path: pathlib.Path) -> None:
    program = (
        "import shutil, types\nshutil.disk_usage = lambda _: types.SimpleNamespace(free=1 << 20)\n" + PROGRAM
    )
    done = run({compilation_cache.VARIABLE: str(tmp_path)}, program)
    assert counts(done) == ("None", 0, 0)
    assert done.stderr.count("\n") == 1
    assert "only 1 MiB are free" in done.stderr


def test_a_user_without_a_home(tmp_path: pathlib.Path) -> None:
    program = "import pathlib\n\ndef none(self): raise RuntimeError('Could not determine home directory.')\n"
    program += "pathlib.Path.expanduser = none\n" + PROGRAM
    done = run({}, program)
    assert counts(done)[0] == "None"
    assert "Could not determine home directory" in done.stderr


def test_the_loaders_notes_are_dropped_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    note = b"E1122 02:15:09.97 20639 cpu_aot_loader.cc:195] Loading XLA:CPU AOT result. Target machine feature ...\n"
    with compilation_cache._without_loader_notes():
        os.write(2, b"before\n" + note + b"after\n")
    assert capfd.readouterr().err == "before\nafter\n"

    def fail() -> None:
        with compilation_cache._without_loader_notes():
            os.write(2, b"why\n" + note)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert capfd.readouterr().err == "why\n"


def test_reading_is_guarded_in_the_pinned_jax(tmp_path: pathlib.Path) -> None:
    """Should a later JAX keep its functions elsewhere, this says so."""
    program = (
        PROGRAM + "from jax._src import compilation_cache as c\nassert c.get_executable_and_time.__wrapped__"
    )
    assert run({compilation_cache.VARIABLE: str(tmp_path)}, program).returncode == 0


def test_the_fingerprint_follows_the_features_and_not_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "one": "processor\t: 0\ncpu family\t: 6\nflags\t\t: fpu avx2 amx_tile\ncpu MHz\t: 2000.1\n\nprocessor\t: 1\n",
        "clock": "processor\t: 0\ncpu family\t: 6\nflags\t\t: avx2 fpu amx_tile\ncpu MHz\t: 3100.0\n\n",
        "older": "processor\t: 0\ncpu family\t: 6\nflags\t\t: fpu avx2\ncpu MHz\t: 2000.1\n\n",
        "arm": "processor\t: 0\nFeatures\t: fp asimd sve\nCPU part\t: 0xd4f\n\n",
    }
    found = {}
    for name, text in texts.items():
        monkeypatch.setattr(pathlib.Path, "read_text", lambda *_, text=text, **__: text)
        found[name] = compilation_cache.cpu_fingerprint()
    assert found["one"] == found["clock"]
    assert len({found["one"], found["older"], found["arm"]}) == 3

    def refuse(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(pathlib.Path, "read_text", refuse)
    for system in ("linux", "darwin"):  # no /proc; and then no sysctl either
        monkeypatch.setattr(sys, "platform", system)
        assert len(compilation_cache.cpu_fingerprint()) == 12
