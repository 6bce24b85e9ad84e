"""Names of files may be any bytes: what is not UTF-8 is printed as it was given."""

import os
import subprocess
import sys

from tests.helpers import tiny_run

TOOL = """
from absl import flags
from hiar_jax.config import command_line

command_line.define_path("out", None, "")
command_line.run_flags(lambda: print(flags.FLAGS.out))
"""


def test_a_name_is_printed_as_it_was_given():
  command = [sys.executable, "-c", TOOL, b"--out=caf\xe9.mp4"]
  # as in a terminal of a UTF-8 locale
  environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
  done = subprocess.run(command, cwd=tiny_run.ROOT, capture_output=True, env=environment)
  assert (done.returncode, done.stdout, done.stderr) == (0, b"caf\xe9.mp4\n", b"")
