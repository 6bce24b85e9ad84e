"""What a run was started with is written down, a line for each start."""

import datetime
import json
import subprocess

import jax
import jaxlib
import pytest

import hiar_jax
from hiar_jax.training import starts
from hiar_jax.training.run import open_run, read_config
from tests.helpers import tiny_run
from tests.helpers.tiny_run import make_run


def lines(workdir) -> list[dict]:
  return [json.loads(line) for line in (workdir / starts.FILE).read_text().splitlines()]


def test_each_start_adds_a_line(tmp_path, monkeypatch):
  command = ["python", "-m", "hiar_jax.train", f"--workdir={tmp_path}"]
  monkeypatch.setattr("sys.orig_argv", command)
  monkeypatch.setattr(starts, "revision", lambda root: f"of {root}")
  make_run(tmp_path)
  make_run(tmp_path, log__every=7)
  first, second = lines(tmp_path)
  now = datetime.datetime.now(datetime.UTC)
  before, after = (datetime.datetime.fromisoformat(line["time"]) for line in (first, second))
  assert before <= after <= now and (now - before).total_seconds() < 100
  assert second["command"] == command and second["revision"] == f"of {tiny_run.ROOT}"
  versions = second["versions"]
  assert (versions["hiar_jax"], versions["jax"]) == (hiar_jax.__version__, jax.__version__)
  assert versions["jaxlib"] == jaxlib.__version__ and versions["python"].startswith("3.")
  assert second["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8, "processes": 1}


@pytest.mark.parametrize("left", [b'{"time": "20', b"\xff" * 9, b""])
def test_half_a_line_is_dropped(tmp_path, left):
  make_run(tmp_path)
  path = tmp_path / starts.FILE
  whole = path.read_bytes()
  path.write_bytes(whole + left)
  make_run(tmp_path)
  assert path.read_bytes().startswith(whole) and len(lines(tmp_path)) == 2


def test_a_run_that_is_read_or_borrowed_is_left_alone(tmp_path):
  make_run(tmp_path / "first")
  before = tiny_run.files(tmp_path / "first")
  open_run(read_config(tmp_path / "first"), tmp_path / "first", save=False)
  make_run(tmp_path / "second", stages_from=str(tmp_path / "first"))
  assert tiny_run.files(tmp_path / "first") == before and len(lines(tmp_path / "second")) == 1


def test_the_revision_is_that_of_a_checkout(tmp_path, monkeypatch):
  def git(*arguments: str) -> str:
    name = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(["git", *name, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()

  package = tmp_path / "checkout" / "package"
  package.mkdir(parents=True)
  revision = starts.revision.__wrapped__  # asks anew
  assert revision(tmp_path) is None
  git("init", "-q")
  assert revision(tmp_path) is None  # nothing is committed
  (tmp_path / "a.py").write_text("1\n")
  git("add", "a.py")
  git("commit", "-qm", "a", "--no-verify")
  monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook
  head = git("--git-dir=.git", "rev-parse", "HEAD")
  assert revision(tmp_path) == head and len(head) == 40
  assert revision(package.parent) is None  # in another project's
  (tmp_path / "a.py").write_text("2\n")
  assert revision(tmp_path) == f"{head}-dirty"
  monkeypatch.setenv("PATH", "")
  assert revision(tmp_path) is None
