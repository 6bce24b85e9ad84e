"""`python -m hiar_jax.evaluate`: rows from runs, and the same table from their files alone."""

import json

import pytest

from hiar_jax.evaluation import report, rows
from tests.helpers import tiny_run
from tests.helpers.measured_rows import table


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
  return tiny_run.chain(tmp_path_factory.getbasetemp())


@pytest.mark.slow
def test_a_table_is_made_from_files(chain, tmp_path):
  for each in table():
    rows.write(tmp_path / "rows", each)
  want = report.write(table(), tmp_path / "want")
  cases = (
    [f"--from={tmp_path / 'rows'}", f"--out={tmp_path / 'got'}"],
    [f"--from={tmp_path / 'want'}", f"--out={tmp_path / 'none'}"],
    [f"--from={tmp_path / 'rows'}", "--workdirs=runs/a", f"--out={tmp_path / 'none'}"],
    [f"--from={tmp_path / 'rows'}"],
    ["--workdirs=runs/a", f"--out={tmp_path / 'none'}", "--baselines=codec,teachers"],
    ["--workdirs=runs/a", f"--out={tmp_path / 'none'}", "--length=0"],
    ["--workdirs=runs/a", f"--out={tmp_path / 'none'}", "--videos=0"],
  )
  made, *refused = chain.commands([("hiar_jax.evaluate", list(case)) for case in cases])
  assert made[0] == 0 and made[1] == want + "\n", made
  for file in ("metrics.json", "table.md", "fifths.png"):
    assert (tmp_path / "got" / file).read_bytes() == (tmp_path / "want" / file).read_bytes()
  messages = ("is no row of hiar_jax.evaluate", "and either --workdirs", "give --out=DIR")
  messages += ("--baselines=teachers: expected some of data,codec,teacher,causal_init",)
  messages += ("--length = 0.0: expected more than 0", "--videos=0: ")
  for (status, _, said), message in zip(refused, messages, strict=True):
    assert status == 2 and message in said and len(said.splitlines()) == 1, said
  assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_runs_are_measured_row_by_row(chain, tmp_path):
  """With all that they are compared with; a second sitting adds its run alone to the rows."""
  done = chain.train(tmp_path / "first", data__frames=6)
  assert done.returncode == 0, done.stderr
  second = chain.train(
    tmp_path / "second",
    config="experiments/shapes_self_forcing.py:smoke",
    data__frames=6,
    stages_from=tmp_path / "first",
  )
  assert second.returncode == 0, second.stderr

  def evaluate(*options):
    made = chain.python("-m", "hiar_jax.evaluate", "--videos=4", *options)
    assert made.returncode == 0, made.stderr
    return made.stdout

  runs = [f"--workdirs={tmp_path / 'first'},{tmp_path / 'second'}"]
  said = evaluate(*runs, f"--out={tmp_path / 'all'}")
  made = tmp_path / "all" / "rows"
  names = {path.stem for path in made.iterdir()}
  assert len(names) == 7 and "true-clips" in names
  assert {path.stem for path in (tmp_path / "all").glob("*.png")} == names - {
    "true-clips",
    "true-clips-through-the-codec-of-8-x-8-pixels",
  } | {"fifths"}
  stored = json.loads((made / "second-block-first-clean-history.json").read_text())
  assert stored["command"] == (
    "python -m hiar_jax.evaluate --workdirs=first,second --videos=4 --length=4 --seed=1000"
  )
  assert stored["config"]["history"]["order"] == "block_first" and "log" not in stored["config"]
  assert str(tmp_path) not in (made / "second-block-first-clean-history.json").read_text()
  in_order = sorted(made.iterdir(), key=lambda path: path.stat().st_mtime_ns)
  files = ",".join(map(str, in_order))
  assert said.endswith(evaluate(f"--from={files}", f"--out={tmp_path / 'from'}"))
  for file in ("metrics.json", "table.md", "fifths.png"):
    assert (tmp_path / "all" / file).read_bytes() == (tmp_path / "from" / file).read_bytes()
  # in a sitting of its own, one run is the same row
  # --baselines= as it was called
  alone = (f"--rows={tmp_path / 'rows'}", f"--out={tmp_path / 'alone'}", "--nobaselines")
  evaluate(f"--workdirs={tmp_path / 'second'}", *alone)
  (path,) = (tmp_path / "rows").iterdir()
  ours, theirs = json.loads(path.read_text()), json.loads((made / path.name).read_text())
  assert ours | {"command": ""} == theirs | {"command": ""}
