"""The script of the table in docs/pods.md: it goes on where it was, and says what it could not make."""

from __future__ import annotations

import json
import pathlib
import re
import sys
from typing import Any

import pytest

from benchmarks import aot_table

REPORT: dict[str, Any] = {
    "mesh": {"data": 4, "fsdp": 1, "model": 1},
    "copies": 1,
    "pairs": 32,
    "needed_bytes": 3 * 2**30,
    "fits": True,
    "flops_per_chip": 5e9,
    "bytes_per_chip": 2e9,
    "collectives": [{"wire_bytes": 2**20}],
    "seconds": {"estimate": 0.010, "by_compiler": 0.016},
    "pairs_per_second": 3200.0,
    "mfu": 0.4,
    "days": 1.5,
    "chip_hours": 144.0,
}
FAKE = """#!{python}
import json, pathlib, sys
flags = dict(flag[2:].split("=", 1) for flag in sys.argv[3:])
pathlib.Path({log!r}).open("a").write(" ".join(sys.argv[3:]) + "\\n")
if flags["topology"] == "v5e-16":
    print("compiling\\nerror: no such thing", file=sys.stderr)
    sys.exit(2)
report = json.loads({report!r})
report["fits"] = flags["step"] != "train" or flags.get("gin.REMAT") == '"full"'
pathlib.Path(flags["output"]).write_text(json.dumps(report))
sys.exit(0 if report["fits"] else 3)
"""


@pytest.fixture
def log(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Each compilation is a line of this file: a stand-in takes the place of the command."""
    path, fake = tmp_path / "log", tmp_path / "python"
    path.touch()
    fake.write_text(FAKE.format(python=sys.executable, log=str(path), report=json.dumps(REPORT)))
    fake.chmod(0o755)
    monkeypatch.setattr(aot_table.sys, "executable", str(fake))
    monkeypatch.setattr(aot_table, "versions", lambda: {"jax": "1", "libtpu": "2"})
    return path


def test_cells_are_made_once_and_the_page_gets_all_of_them(
    log: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "pods.md"
    page.write_text(f"before\n{aot_table.BEGIN}\nold\n{aot_table.END}\nafter\n")
    flags = [f"--cache={tmp_path / 'cache'}", f"--docs={page}", "--sizes=60m", "--slices=v5e-4"]
    assert aot_table.main([*flags, "--steps=score"]) == 0
    assert len(log.read_text().splitlines()) == 1
    assert aot_table.main([*flags, "--steps=score,train"]) == 0
    lines = log.read_text().splitlines()
    assert len(lines) == 4  # train with none, dots and full
    assert ["REMAT" in line for line in lines] == [False, False, True, True]
    assert "--gin_file=gin/runs/inranker_60m_phase2.gin" in lines[0]
    assert '--gin.DTYPE="bfloat16"' in lines[0]
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert (
        "| train | 4 x 1 x 1 | 32 | full | 3.00 | 15.75 | yes | 5 | 2.0 | 1 | 10 ms | 16 ms | 3,200 | 40% |"
        in text
    )
    assert "1.50 days, 144 chip-hours" in text
    assert "1M pairs: 5.2 min" in text
    found = json.loads(page.with_suffix(".json").read_text())
    assert [(cell["size"], cell["slice"], cell["fits"]) for cell in found] == [("60m", "v5e-4", True)] * 2
    # Nothing is made twice, nor when only a report is asked for.
    assert aot_table.main([*flags, "--steps=train"]) == 0
    assert aot_table.main([f"--cache={tmp_path / 'cache'}", "--docs=", "--report_only"]) == 0
    assert len(log.read_text().splitlines()) == 4
    assert "not made yet" in capsys.readouterr().out


def test_other_versions_make_a_cell_anew(
    log: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [f"--cache={tmp_path / 'cache'}", "--docs=", "--sizes=3b", "--slices=v4-128", "--steps=label"]
    assert aot_table.main(flags) == 0
    monkeypatch.setattr(aot_table, "versions", lambda: {"jax": "1", "libtpu": "3"})
    assert aot_table.main(flags) == 0
    assert len(log.read_text().splitlines()) == 2


def test_cells_of_earlier_sources_stay_on_the_page(
    log: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "pods.md"
    page.write_text(f"{aot_table.BEGIN}\n{aot_table.END}\n")
    flags = [f"--cache={tmp_path / 'cache'}", f"--docs={page}", "--sizes=60m", "--slices=v5e-4"]
    assert aot_table.main([*flags, "--steps=label,score"]) == 0
    assert "earlier" not in page.read_text()
    monkeypatch.setattr(aot_table, "versions", lambda: {"jax": "1", "libtpu": "3"})
    assert aot_table.main([*flags, "--steps=score"]) == 0
    assert page.read_text().count("| 60M | v5e-4 |") == 2
    assert "1 of the cells by an earlier state of the sources." in page.read_text()


def test_what_fails_is_named_and_tried_again(
    log: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--cache={tmp_path / 'cache'}", "--docs=", "--sizes=60m", "--slices=v5e-16", "--steps=train"]
    assert aot_table.main(flags) == aot_table.main(flags) == 0
    assert "60m v5e-16 train: error: no such thing" in capsys.readouterr().out
    assert len(log.read_text().splitlines()) == 2


def test_a_page_without_marks_and_unknown_names_are_errors(log: pathlib.Path, tmp_path: pathlib.Path) -> None:
    page = tmp_path / "pods.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="aot_table begin"):
        aot_table.write_docs(tmp_path, page)
    with pytest.raises(SystemExit):
        aot_table.main(["--sizes=61m"])


def test_batches_are_read_by_every_host() -> None:
    assert [aot_table.batch_size(name) for name in aot_table.SLICES] == [32, 32, 512, 128]
    flags = aot_table.arguments("3b", "v5e-256", "train", None)
    assert "--gin.BATCH_SIZE=512" in flags
    assert f"--gin.TRAIN_STEPS={329_000 // 16}" in flags
    assert "--gin.FSDP=16" in flags


def test_the_page_of_the_repository_has_its_marks() -> None:
    text = aot_table.DOCS.read_text()
    assert text.count(aot_table.BEGIN) == text.count(aot_table.END) == 1


def test_the_page_of_the_repository_says_how_many_cells_are_of_earlier_sources() -> None:
    """After a change: `python benchmarks/aot_table.py --report_only`, or the cells anew."""
    cells = json.loads((aot_table.DOCS.parent / "pods.json").read_text())
    older = sum(cell["versions"]["sources"] != aot_table.versions()["sources"] for cell in cells)
    found = re.findall(r"(\d+) of the cells by an earlier state", aot_table.DOCS.read_text())
    assert [int(number) for number in found] == ([older] if older else [])


def test_comments_and_docstrings_make_no_cell_anew_but_settings_and_code_do(tmp_path: pathlib.Path) -> None:
    def meaning(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return aot_table.meaning(tmp_path / name)

    code = 'def f(x):\n    """Old."""\n    return x\n'
    assert meaning("a.py", code) == meaning(
        "a.py", '# new\ndef f(x):\n    """New."""\n    return x  # here\n'
    )
    assert meaning("a.py", code) != meaning("a.py", code.replace("return x", "return 2 * x"))
    assert meaning("a.gin", "# old\nREMAT = 1\n") == meaning("a.gin", "REMAT = 1  # new\n\n")
    assert meaning("a.gin", "REMAT = 1\n") != meaning("a.gin", "REMAT = 2\n")
