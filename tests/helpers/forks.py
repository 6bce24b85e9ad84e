"""Code in forks of a process that has imported what takes long: each starts at once."""

import json
import os
import subprocess
import sys
import threading

# A line of JSON in, [code, arguments], is a line of JSON out: [exit status, stdout, stderr].
SERVER = """
import json, os, sys, tempfile

def run(code, arguments):
  out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
  child = os.fork()
  if not child:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.argv, status = ["-c", *arguments], 1
    try:
      exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))
      status = 0
    except SystemExit as end:
      status = int(end.code or 0)
    except BaseException:
      import traceback
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  status, texts = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), []
  for file in (out, err):
    file.seek(0)
    texts.append(file.read().decode())
  return status, *texts

answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
  print(json.dumps(run(*json.loads(line))), file=answers, flush=True)
"""


class Forks:
  """Runs `python -W warnings -c code arguments` in a directory, one after another.

  imports: Python of the process that is forked, before it is; it may start no thread. root: of the
  package.
  """

  def __init__(self, directory, root, imports: str, environment=None, warnings: str = "error"):
    self._process = subprocess.Popen(
      [sys.executable, "-W", warnings, "-c", f"{imports}\n{SERVER}"],
      cwd=directory,
      env={**(environment or os.environ), "PYTHONPATH": str(root)},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def run(self, code: str, arguments) -> tuple[int, str, str]:
    patience = threading.Timer(900, self._process.kill)
    patience.start()
    try:
      print(json.dumps([code, list(arguments)]), file=self._process.stdin, flush=True)
      answer = self._process.stdout.readline()
    finally:
      patience.cancel()
    assert answer, f"the process has ended, or {arguments} took a quarter of an hour"
    status, out, err = json.loads(answer)
    return status, out, err

  def close(self) -> None:
    self._process.communicate()
