"""What .ci/run does before the tests, and what the README's command says of those that it leaves
out.
"""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
APT = """#!/bin/sh
echo "$@" >> "$LOG"
case "$*" in *install*)
  for name in $INSTALLS; do printf '#!/bin/sh\\n' > "$BIN/$name"; chmod +x "$BIN/$name"; done;;
esac
exit "$STATUS"
"""


@pytest.fixture
def machine(tmp_path):
  """browser(...) -> (what .ci/browser says, the calls of apt-get) on a machine that has what it is
  told to have.
  """

  def browser(has=(), uid=0, apt=True, installs="chromium chromedriver", status=0):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "sh", "chmod", "timeout", "sleep"):
      (programs / name).symlink_to(subprocess.check_output(["which", name], text=True).strip())
    scripts = {
      "id": f"#!/bin/sh\necho {uid}\n",
      **dict.fromkeys(has, "#!/bin/sh\n"),
      **({"apt-get": APT} if apt else {}),
    }
    for name, text in scripts.items():
      (programs / name).write_text(text)
      (programs / name).chmod(0o755)
    log = tmp_path / "log"
    log.touch()
    environment = {
      "PATH": str(programs),
      "BIN": str(programs),
      "LOG": str(log),
      "INSTALLS": installs,
      "STATUS": str(status),
    }
    done = subprocess.run(
      ["bash", str(ROOT / ".ci" / "browser")],
      env=environment,
      capture_output=True,
      text=True,
      timeout=60,
    )
    assert done.returncode == 0 and done.stdout == ""
    return done.stderr, [line.split()[3] for line in log.read_text().splitlines()]

  return browser


def test_what_is_there_is_left_alone(machine):
  assert machine(has=("chromium", "chromedriver")) == ("", [])


def test_what_is_missing_is_installed(machine):
  assert machine(has=("chromium",)) == ("", ["update", "install"])


@pytest.mark.parametrize(
  "here, why, calls",
  [
    ({"uid": 1000}, "this is not root", []),
    ({"apt": False}, "here is no apt-get", []),
    ({"status": 100}, "apt-get could not", ["update"]),
    ({"installs": "chromium"}, "apt-get did not", ["update", "install"]),
  ],
  ids=lambda part: part if isinstance(part, str) else "",
)
def test_where_it_cannot_be_installed_it_says_so_in_one_line(machine, here, why, calls):
  assert machine(**here) == (
    f"chromium and chromium-driver are not installed ({why}): the browser tests will be skipped\n",
    calls,
  )


def test_a_mirror_that_does_not_answer_does_not_hold_up_the_tests(tmp_path, machine, monkeypatch):
  monkeypatch.setitem(globals(), "APT", "#!/bin/sh\nexec sleep 1000\n")
  run = subprocess.run
  hurried = lambda command, **options: run(
    command, **options | {"env": options.get("env", dict(os.environ)) | {"SECONDS_AT_MOST": "0.2"}}
  )
  monkeypatch.setattr(subprocess, "run", hurried)
  said, _ = machine()
  assert "apt-get could not" in said


def test_the_installation_comes_before_the_tests():
  lines = [
    line
    for line in (ROOT / ".ci" / "run").read_text().splitlines()
    if line and not line.startswith("#")
  ]
  assert lines.index(".ci/browser") < next(
    i for i, line in enumerate(lines) if line.startswith("eval ")
  )


def test_what_is_left_out_is_named():
  """Without a browser its tests are skipped, and the last lines say so and what to do."""
  command = [
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "-m",
    "not slow",
    "-p",
    "no:cacheprovider",
    "tests/serving/test_browser.py",
  ]
  path = os.pathsep.join(
    p
    for p in os.environ["PATH"].split(os.pathsep)
    if not os.path.exists(os.path.join(p, "chromedriver"))
  )
  done = subprocess.run(
    command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300
  )
  assert done.returncode in (0, 5), done.stdout + done.stderr  # 5: nothing else was asked for
  (line,) = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
  assert (
    "test_browser.py" in line
    and "not installed: chromium, chromedriver" in line
    and "apt-get install chromium" in line
  ), line
