"""Progress: a bar on a terminal, a plain line now and then elsewhere, from one process."""

import io
import sys
import time

from hiar_jax.progress import Progress


def test_off_a_terminal_progress_is_occasional_plain_lines(capsys):
  with Progress("teacher", 100) as bar:
    for step in range(1, 51):
      bar.update(step, loss=0.25)
  (line,) = capsys.readouterr().err.splitlines()  # 20 s have not passed: only where it ended
  assert line.startswith("teacher: 50/100 [") and line.endswith(", loss=0.25]")
  assert "step/s" in line and "<" in line  # speed, and time left after the <
  with Progress("init", 4, initial=2, seconds=0) as bar:
    bar.update(3)
    bar.update(4)
  assert [line.split(" ")[1] for line in capsys.readouterr().err.splitlines()] == ["3/4", "4/4"]


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr(sys, "stderr", terminal)
  with Progress("teacher", 100, initial=10) as bar:
    bar.update(60, loss=0.25)
  last = terminal.getvalue().split("\r")[-1]
  assert "60%" in last and "60/100" in last and "loss=0.25" in last


def test_without_an_end_it_counts(monkeypatch, capsys):
  with Progress("stream", None, unit="frame") as bar:
    bar.wait_for("compiling")
    bar.update(12)
  first, last = capsys.readouterr().err.splitlines()
  assert first == "stream: compiling" and last.startswith("stream: 12 [00:00, ")
  assert "frame/s" in last and "?" not in last.split(", ")[0]
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr(sys, "stderr", terminal)
  with Progress("stream", None) as bar:
    bar.wait_for("compiling")
    bar.update(12)
  assert "compiling" in terminal.getvalue() and "/?" not in terminal.getvalue()


def test_what_is_compiled_is_no_part_of_the_speed(monkeypatch, capsys):
  clock = [0.0]
  monkeypatch.setattr(time, "monotonic", lambda: clock[0])
  with Progress("teacher", 100, initial=10) as bar:
    for step, now in ((11, 100.0), (12, 102.0), (20, 118.0)):
      clock[0] = now
      bar.update(step)
  *_, last = capsys.readouterr().err.splitlines()
  assert last == "teacher: 20/100 [01:58<02:40,  2.00s/step]"  # 80 of 2 s are left
  with Progress("teacher", 100) as bar:  # a clock that stands still
    bar.update(1)
    bar.update(2)
  assert capsys.readouterr().err.startswith("teacher: 2/100 ")
