"""The fuzzer: it notices what it is for, repeats a case, and a few cases of every kind pass."""

import pathlib
import shutil

import numpy as np
import pytest

from benchmarks.fuzz import __main__ as harness
from benchmarks.fuzz import models, mutations, weights, worker
from benchmarks.fuzz.kinds import KINDS
from hiar_jax.errors import UserError
from tests.helpers.slow_cases import few


@pytest.fixture(scope="module")
def rights(tmp_path_factory):
  made = {}

  def get(name):
    if name not in made:
      made[name] = tmp_path_factory.mktemp(name)
      KINDS[name].make(made[name])
    return made[name]

  return get


def test_what_is_right_is_read(rights, tmp_path):
  """So that what is refused is refused for what was broken."""
  for name in ("video", "picture", "prompts", "timeline", "captions", "weights"):
    for path in sorted(rights(name).iterdir()):
      copy = tmp_path / name / path.name
      copy.parent.mkdir(exist_ok=True)
      copy.write_bytes(path.read_bytes())
      if name == "captions":
        copy = copy.rename(copy.with_name("metadata.jsonl"))
      KINDS[name].read(copy)
  KINDS["config"].read([("teacher.lr", 0.5)])
  with pytest.raises(UserError):
    KINDS["config"].read([("teacher.lr", -0.5)])


def test_weights_that_are_right_are_read(rights, tmp_path):
  weights.read(rights("shards"))
  for name in ("taew2_1.pth", "generator.pt"):
    weights.read(pathlib.Path(shutil.copy(rights("torch") / name, tmp_path / name)))
    shutil.rmtree(tmp_path / "out")
  with pytest.raises(UserError, match="in the format of PyTorch before 1.6"):
    weights.read(rights("torch") / "legacy.pt")


@pytest.mark.slow
def test_a_call_that_is_right_returns(rights):
  for name, arguments in models.DOOR.items():
    given = {key: value for key, value in arguments.items() if value is not None}
    if name == "watch":  # of packed models alone
      with pytest.raises(UserError, match="this model is causal"):
        models.call((rights("python") / "run", name, given))
    else:
      models.call((rights("python") / "run", name, given))


@pytest.mark.slow
def test_a_stream_that_is_right_is_resumed(rights, tmp_path):
  shutil.copytree(rights("stream") / "made", tmp_path / "made")
  models.read_stream((rights("stream") / "run", tmp_path / "made"))


CASES = [(name, number) for name in sorted(KINDS) for number in range(40)]
SLOW = ("python", "run", "shards", "stream", "torch", "upload", "weights")
QUICK = [(name, n) for name, n in CASES if n < 4 and name not in SLOW]


@pytest.mark.parametrize(("name", "number"), few(CASES, *QUICK))
def test_cases(rights, name, number):
  dice = np.random.default_rng([7, sorted(KINDS).index(name), number])
  answer = worker.read_case(KINDS[name], rights(name), dice)
  assert answer["outcome"] in ("read", "refused"), answer["what"]


def test_a_case_is_repeated_by_its_number():
  changed = [
    mutations.mutated(bytes(range(200)), np.random.default_rng([1, 2, n])) for n in (5, 5, 6)
  ]
  assert changed[0] == changed[1] != changed[2]


def test_both_agree_on_the_kinds():
  assert set(harness.NAMES) == set(KINDS)


def test_faults_are_noticed(monkeypatch, capsys):
  monkeypatch.setattr(harness, "MEMORY", 200.0)
  monkeypatch.setattr(harness, "START", 20.0)
  reader = harness.Reader("tests.benchmarks.planted_faults")
  try:
    outcomes = lambda name, count=2, seconds=10.0: [
      reader.read(name, 0, number, seconds)["outcome"] for number in range(count)
    ]
    assert set(outcomes("well", 12)) == {"read", "refused"}
    assert outcomes("raises") == ["fault"] * 2
    assert outcomes("says nothing") == ["fault"] * 2
    assert outcomes("eats") == ["read", "memory"]
    assert outcomes("exits") == ["dead"] * 2
    assert set(outcomes("well", 12)) == {"read", "refused"}
    monkeypatch.setattr(harness, "START", 0.2)
    assert outcomes("hangs", 1, 0.2) == ["hangs"]
    counts, findings = harness.fuzz(["raises"], 0, 3, 0.0, reader)
  finally:
    reader.close()
  assert counts == {"raises": {"fault": 1}} and "a reader's own" in findings[0]
  assert "python -m benchmarks.fuzz --seed=0 --kinds=raises --case=3" in capsys.readouterr().out


def test_unknown_kinds(capsys):
  with pytest.raises(SystemExit):
    harness.main(["--kinds=films"])
  assert "expected some of captions, config" in capsys.readouterr().err
