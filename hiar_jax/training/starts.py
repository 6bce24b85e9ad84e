"""What a run was started with, a line for each start in `<workdir>/logs/starts.jsonl`:

    {"time": "2026-11-02T09:30:00+00:00", "command": ["python", "-m", "hiar_jax.train", ...],
     "versions": {"hiar_jax": "0.1.0", "jax": ..., "jaxlib": ..., "python": ...},
     "revision": "2f7c...-dirty",
     "devices": {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1}}

revision: of the checkout that the package lies in, with -dirty where files of it were changed; null
where it lies in none. The numbers of a run depend on none of it but by rounding, so nothing
compares it.
"""

import datetime
import functools
import json
import os
import pathlib
import platform
import subprocess
import sys

import jax
from jax.sharding import Mesh
import jaxlib

import hiar_jax
from hiar_jax.files import write_atomic

FILE = pathlib.PurePath("logs", "starts.jsonl")  # in a workdir
PACKAGE = pathlib.Path(__file__).resolve().parents[1]
_PATIENCE = 10  # seconds for git, which may lie on a slow disk


def keep(workdir: str | os.PathLike, mesh: Mesh) -> None:
  """Adds the line of this process's start, and drops one that a full disk or a copy cut off."""
  path = pathlib.Path(workdir) / FILE
  lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
  whole = [line for line in lines if line.endswith(b"\n")]
  write_atomic(path, b"".join([*whole, (json.dumps(describe(mesh)) + "\n").encode()]))


def describe(mesh: Mesh) -> dict:
  """Returns what this process was started with; mesh: of the devices that it works on."""
  device = mesh.devices.flat[0]
  return {
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": sys.orig_argv,
    "versions": {
      "hiar_jax": hiar_jax.__version__,
      "jax": jax.__version__,
      "jaxlib": jaxlib.__version__,
      "python": platform.python_version(),
    },
    "revision": revision(PACKAGE.parent),
    "devices": {
      "platform": device.platform,
      "kind": device.device_kind,
      "count": mesh.devices.size,
      "processes": jax.process_count(),
    },
  }


@functools.cache
def revision(root: pathlib.Path) -> str | None:
  """Returns the revision of a checkout, with -dirty where its files were changed; None where there
  is no checkout, or no git that tells.
  """
  if not (root / ".git").exists():  # a folder above may be another project's
    return None
  environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
  try:
    said = subprocess.run(
      ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
      cwd=root,
      env={**environment, "GIT_OPTIONAL_LOCKS": "0"},
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=_PATIENCE,
      check=True,
    )
  except (OSError, ValueError, subprocess.SubprocessError):
    return None
  return said.stdout.strip() or None
