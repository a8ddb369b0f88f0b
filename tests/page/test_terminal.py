"""What is printed reaches any terminal, pipe or file, in whichever encoding it is; the log is UTF-8."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rankwise
from rankwise import cli
from rankwise.page import terminal

SIGNS = "".join(
    sorted({sign for path in Path(rankwise.__file__).parent.rglob("*.py") for sign in path.read_text("utf-8")})
)
LIMITED = ("ascii", "latin-1", "cp1252", "cp437", "cp1251", "shift_jis")


@pytest.mark.parametrize("encoding", LIMITED)
def test_every_sign_of_the_package_can_be_printed(encoding: str) -> None:
    printed = SIGNS.encode(encoding, terminal.ERRORS).decode(encoding)
    assert "ok" in printed or "\u2713" in printed
    assert (
        "\u2713 \u2013 \u03c3\u00b2 caf\u00e9 \u2192 \u4eac".encode("ascii", terminal.ERRORS)
        == b"ok - sigma2 cafe -> ?"
    )


def test_a_file_name_that_is_no_text_can_be_printed() -> None:
    name = os.fsdecode(b"caf\xe9")
    assert name.encode("utf-8", terminal.ERRORS) == b"caf\xe9"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_both_streams_of_a_command_take_every_sign(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reverted (no `readable` in `main`), this is a UnicodeEncodeError after the work is done."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])

    def work(argv: object) -> None:
        print("\u2713 done \u2192 \u03a3\u03c3\u00b2")
        raise rankwise.DataError("row 7 \u2013 \u3042 is broken")

    monkeypatch.setattr(cli, "dispatch", work)
    assert cli.main(["report"]) == 3
    for stream in streams:
        stream.flush()
    said = [stream.buffer.getvalue().decode(encoding) for stream in streams]  # type: ignore[attr-defined]
    assert said[0].startswith("ok done -> Sigmasigma") and said[1].startswith("rankwise: row 7")


def test_the_log_is_utf8_whatever_the_terminal_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    run = tmp_path / "caf\u00e9"
    run.mkdir()
    (run / "training_log.csv").write_text("step,loss\n1,2.5\n2,2.0\n", encoding="utf-8")
    recipe = tmp_path / "page.yaml"
    recipe.write_text(f"stages: [{{command: report, run: {run}}}]", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", open(1, "w", closefd=False, encoding="latin-1"))  # noqa: SIM115
    assert cli.main(["run", str(recipe), "-o", str(tmp_path / "r"), "--log_file", "auto"]) == 0
    assert "caf\u00e9".encode("latin-1") in capfdbinary.readouterr().out
    (log,) = (tmp_path / "r" / "logs").glob("*.log")
    assert f"report: {run}" in log.read_text(encoding="utf-8")


def test_what_a_message_quotes_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--data_path", "no\x1b[31mfile\u202e", "--task", "conversations"]) != 0
    shown = capsys.readouterr().err
    assert "no�[31mfile�" in shown and "\x1b" not in shown


def test_nobody_reads_on() -> None:
    """`rankwise --help | head -1` ends without a traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "rankwise", "--help"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 141
    assert b"Traceback" not in done.stderr and b"Error" not in done.stderr
