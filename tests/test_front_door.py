"""The README's first block, what .ci/run takes from it, the links of all pages, and the list of
commands.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from hiar_jax import __main__ as listing
from tests.helpers import tiny_run

ROOT = tiny_run.ROOT
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
STUB = """#!/bin/sh
mkdir -p "$VENV/bin"
printf '#!/bin/sh\\nfor a in "$@"; do printf "<%%s>" "$a" >> "$LOG"; done; echo >> "$LOG"' \\
  > "$VENV/bin/python"
chmod +x "$VENV/bin/python"
echo "setup $*" >> "$LOG"
"""


def test_the_first_block_is_two_commands_that_set_up_and_do():
  readme = (ROOT / "README.md").read_text()
  first = re.search(r"```bash\n(.*?)```", readme, re.DOTALL).group(1).splitlines()
  job, tests = (line.split(" && ") for line in first)
  assert job[0] == "launch/setup.sh" and job[1].startswith(".venv/bin/python -m hiar_jax.train ")
  assert tests[0] == "launch/setup.sh test" and " -m pytest " in tests[1]
  assert len(readme.splitlines()) <= 220


def test_ci_runs_the_command_of_the_readme(tmp_path):
  for name in (".ci/run", "README.md"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / name, tmp_path / name)
  (tmp_path / "launch").mkdir()
  for name, text in ((".ci/browser", "#!/bin/sh\n"), ("launch/setup.sh", STUB)):
    (tmp_path / name).write_text(text)
    (tmp_path / name).chmod(0o755)
  log = tmp_path / "log"
  environment = {**os.environ, "LOG": str(log), "TMPDIR": str(tmp_path)}
  subprocess.run([tmp_path / ".ci" / "run"], env=environment, check=True, timeout=60)
  lines = log.read_text().splitlines()
  assert lines[0] == "setup test,parity"
  assert lines[-1] == "<-m><pytest><-q><-m><not slow><-n><2><--dist><loadfile>"
  assert not list(tmp_path.glob("hiar_jax_ci.*"))  # the environment is gone


def test_an_old_python_is_refused_in_one_line():
  environment = {**os.environ, "PYTHON": "false"}
  done = subprocess.run(
    [ROOT / "launch" / "setup.sh"], env=environment, capture_output=True, text=True, timeout=60
  )
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr.count("\n") == 1 and "false is not Python 3.11 or later" in done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
  links = re.findall(r"\]\(([^)#]+)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
  missing = [
    link for link in links if "://" not in link and not (page.parent / pathlib.Path(link)).exists()
  ]
  assert not missing


def test_all_commands_are_listed():
  starts = {
    path.stem
    for path in (ROOT / "hiar_jax").glob("*.py")
    if '__name__ == "__main__"' in path.read_text()
  }
  assert starts - {"__main__", "compare"} == set(listing.COMMANDS)  # compare: a former name
  done = subprocess.run(
    [sys.executable, "-m", "hiar_jax"], cwd=ROOT, capture_output=True, text=True, check=True
  )
  lines = done.stdout.splitlines()
  assert len(lines) == len(listing.COMMANDS) + 1
  for name, line in zip(listing.COMMANDS, lines[:-1], strict=True):
    assert re.fullmatch(rf"python -m hiar_jax\.{name} +\S.*", line) and len(line) > 40
