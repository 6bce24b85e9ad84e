"""Two trees of this repository side by side: a revision of git, and the working tree as it is.

Both are copied into directories of their own, so that nothing which is edited meanwhile gets in,
and each is run with its own code alone (see `environment`). Nothing here imports hiar_jax: these
tools compare it with itself.
"""

from collections.abc import Iterator
import contextlib
import io
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("hiar_jax", "experiments", "benchmarks")
OWN_CODE = ROOT / "benchmarks" / "own_code"  # see sitecustomize.py there

_WHERE = """
import importlib, sys
for name in sys.argv[1:]:
  print(importlib.import_module(name).__file__)
"""


class TreeError(Exception):
  """A tree that cannot be had or run, in one line."""


@contextlib.contextmanager
def scratch(keep: str | None = None) -> Iterator[pathlib.Path]:
  """A new directory that is removed at the end; or `keep`, made where it is missing: it stays."""
  if keep:
    pathlib.Path(keep).mkdir(parents=True, exist_ok=True)
    yield pathlib.Path(keep).resolve()
  else:
    with tempfile.TemporaryDirectory(prefix="hiar_jax_trees.") as folder:
      yield pathlib.Path(folder).resolve()


def unpack(revision: str, directory: pathlib.Path, root: pathlib.Path = ROOT) -> None:
  """Writes the files of a revision into a new `directory`. Raises TreeError where there is none."""
  archive = _git(root, "archive", "--format=tar", commit(revision, root))
  half = directory.with_name(f"{directory.name}.half")  # a killed process leaves no half tree
  shutil.rmtree(half, ignore_errors=True)
  half.mkdir(parents=True)
  with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
    tar.extractall(half, filter="data")
  half.rename(directory)


def snapshot(directory: pathlib.Path, root: pathlib.Path = ROOT) -> None:
  """Copies the working tree into a new `directory`: what git tracks or does not ignore."""
  listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").decode()
  directory.mkdir(parents=True)
  for name in filter(None, listed.split("\0")):
    path = root / name
    # one that was deleted is listed until that is committed; a link may be to a folder
    if path.is_file() or path.is_symlink():
      (directory / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(path, directory / name, follow_symlinks=False)


def commit(revision: str, root: pathlib.Path = ROOT) -> str:
  """The full hash of a revision. Raises TreeError where there is none of that name."""
  found = _git(root, "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
  return found.decode().strip()


def name_of_working_tree(root: pathlib.Path = ROOT) -> str:
  """Such as `working tree at 52ee0430d1a7 with changes`."""
  changed = " with changes" if _git(root, "status", "--porcelain").strip() else ""
  return f"working tree at {commit('HEAD', root)[:12]}{changed}"


def _git(root: pathlib.Path, *arguments: str) -> bytes:
  done = subprocess.run(["git", "-C", root, *arguments], capture_output=True)
  if done.returncode:
    said = done.stderr.decode(errors="replace").strip()
    raise TreeError(f"git {' '.join(arguments)}: {said.splitlines()[-1] if said else 'failed'}")
  return done.stdout


def environment(tree: pathlib.Path, **variables: str) -> dict[str, str]:
  """Variables under which Python finds hiar_jax, experiments and benchmarks in `tree`, and nowhere
  else.

  Set for a process in any directory, and for those that it starts. `variables` are added.
  """
  path = [str(tree), str(OWN_CODE), *filter(None, [os.environ.get("PYTHONPATH")])]
  found = {**os.environ, "PYTHONPATH": os.pathsep.join(path), **variables}
  found.pop("PYTHONDONTWRITEBYTECODE", None)  # else each start would compile the tree's files anew
  return found


def check(tree: pathlib.Path, packages: tuple[str, ...] = PACKAGES) -> None:
  """Raises TreeError unless Python, started anywhere, finds the packages in this tree."""
  with tempfile.TemporaryDirectory() as elsewhere:
    done = subprocess.run(
      [sys.executable, "-c", _WHERE, *packages],
      cwd=elsewhere,
      env=environment(tree),
      capture_output=True,
      text=True,
    )
  if done.returncode:
    raise TreeError(f"{tree}: {(done.stderr.strip().splitlines() or ['cannot be imported'])[-1]}")
  for path in done.stdout.splitlines():
    if not pathlib.Path(path).resolve().is_relative_to(tree):
      raise TreeError(f"{tree} would run with {path}, which is not its own")
