"""A config file is code: whatever is raised while it is loaded is one line with its place."""

import pytest

from hiar_jax.config import command_line
from hiar_jax.errors import UserError
from tests.helpers import tiny_run
from tests.helpers.forks import Forks

JOB = """
from hiar_jax.config import command_line

command_line.run(lambda c, workdir: print(c.width))
"""
HEAD = "from ml_collections import ConfigDict\n"
GET = "def get_config(): "
BROKEN = {
  "no Python": ("x = 1\ndef get_config(:\n", ":2: SyntaxError: invalid syntax (a.py, line 2)"),
  "a module that is not there": (
    "import nowhere",
    ":1: ModuleNotFoundError: No module named 'nowhere'",
  ),
  "a name that a module has not": ("\nfrom os import nope", ":2: ImportError: cannot import name"),
  "a module that is no Python": (
    "\nimport sys; sys.path.insert(0, '.')\nimport broken",
    ":3: SyntaxError: '(' was never closed (broken.py, line 2)",
  ),
  "a name": (f"{GET}return nope", ":1: NameError: name 'nope' is not defined"),
  "an assertion": (f"{GET}\n  assert False", ":2: AssertionError\n"),
  "an assertion with words": ("assert False, 'width is odd'", ":1: AssertionError: width is odd"),
  "a division": (f"x = 2\n{GET}return 1 / 0", ":2: ZeroDivisionError: division by zero"),
  "not implemented": (f"{GET}raise NotImplementedError", ":1: NotImplementedError\n"),
  "itself": (f"{GET}return get_config()", ":1: RecursionError: maximum recursion"),
  "another file": ("open('nowhere')", ":1: FileNotFoundError: [Errno 2] No such file or directory"),
  "bytes": (b"x = '\xff'", "SyntaxError: (unicode error)"),
  "nothing": (f"{GET}pass", "get_config() returned None, expected a ConfigDict"),
  "a number": (f"{GET}return 3", "get_config() returned int, expected a ConfigDict"),
  "no function": ("x = 1", "a.py has no function get_config()"),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
  """-> (what `--config=a.py` of a content answers, options beside it)."""
  directory = tmp_path_factory.mktemp("job")
  (directory / "broken.py").write_text("\nx = (")
  forks = Forks(directory, tiny_run.ROOT, "import hiar_jax.config.command_line")

  def run(content, *options):
    content = content if isinstance(content, bytes) else f"{content}\n".encode()
    (directory / "a.py").write_bytes(content)
    return forks.run(JOB, ["--config=a.py", "--workdir=w", *options])

  yield run
  forks.close()


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("options", [(), ("--config.width=3",)])
def test_it_is_one_line(job, case, options):
  content, said = BROKEN[case]
  status, out, err = job(content, *options)
  assert (status, out, err.count("\n")) == (2, "", 1), err
  assert err.startswith("error: --config=a.py: ") and said in err


def test_it_is_the_same_in_python(tmp_path):
  (tmp_path / "a.py").write_text("\ndef get_config(:\n")
  with pytest.raises(UserError, match=r"a\.py:2: SyntaxError: invalid syntax"):
    command_line.load_config(str(tmp_path / "a.py"))


def test_a_config_that_is_whole_is_locked_and_overridden(job):
  status, out, err = job(f"{HEAD}{GET}return ConfigDict({{'width': 2}})", "--config.width=3")
  assert (status, out, err) == (0, "3\n", "")
