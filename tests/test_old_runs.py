"""Files of an earlier commit (golden_runs/) are read, gone on with, and give what they gave."""

import dataclasses
import pathlib
import tarfile

import pytest

from tests.helpers import old_run, tiny_run

# What the rest of a run's distillation has no business to touch, and where it leaves something new.
DONE = ("data/", "teacher/", "trajectories/", "causal_init/", "distill/checkpoints/4/")
NEW = ("data/words.json", "origins/", "distill/checkpoints/6/", "logs/", "sample/")

pytestmark = pytest.mark.slow  # nine commands, compiled as the recordings were made


@dataclasses.dataclass(frozen=True)
class Worked:
  """Where `train` worked, where all other commands did, and what files were there before."""

  training: pathlib.Path
  using: pathlib.Path
  before: dict[str, tuple[str, int]]
  results: dict[str, tuple[int, str, str]]

  def place(self, command: str) -> pathlib.Path:
    """Raises AssertionError, with what it said, where the command has failed."""
    status, _, err = self.results[command]
    assert status == 0 and "Traceback" not in err, f"{command}: {err}"
    return self.training if command == "train" else self.using


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
  root = tmp_path_factory.mktemp("old")
  training, using = (old_run.unpack(root / name) for name in ("training", "using"))
  before = old_run.digests(using)
  chain = tiny_run.chain(tmp_path_factory.getbasetemp())
  return Worked(training, using, before, old_run.work(chain, training, using))


@pytest.mark.parametrize("command", old_run.RESULTS)
def test_it_gives_what_the_earlier_commit_gave(worked, command):
  """Weights at the end of training, videos of a run and of weights, the next blocks of streams."""
  found = old_run.RESULTS[command](worked.place(command))
  old_run.assert_same(found, old_run.recorded(command), command)


def packed(name: str) -> bytes:
  with tarfile.open(old_run.ARCHIVE) as archive:
    return archive.extractfile(name).read()


def test_training_goes_on_where_it_was_stopped(worked):
  """The rest of the distillation and the samples are made, and nothing that was there again."""
  run = worked.place("train") / "shapes" / "run"
  after, of_run = old_run.digests(run), "shapes/run/"
  before = {n.removeprefix(of_run): was for n, was in worked.before.items() if n.startswith(of_run)}
  done = {name: was for name, was in before.items() if name.startswith(DONE)}
  assert all(any(name.startswith(part) for name in done) for part in DONE)
  assert {name: after.get(name) for name in done} == done
  assert [name for name in after.keys() - before.keys() if not name.startswith(NEW)] == []
  assert (run / "config.json").read_bytes() == packed("shapes/run/config.json")
  log = (run / "logs" / "metrics.jsonl").read_bytes()
  assert log.startswith(packed("shapes/run/logs/metrics.jsonl"))


def test_what_is_only_read_is_not_touched(worked):
  """Run, weights and texts; nor is a video made again for the prompt and seed that it is of."""
  for command in worked.results:
    worked.place(command)
  after = old_run.digests(worked.using)
  changed = [name for name, was in worked.before.items() if after.get(name) != was]
  streams = ("shapes/stream.mp4", "shapes/saved/1/", "wan/saved/1/")
  assert [name for name in changed if not name.startswith(streams)] == []
  new = after.keys() - worked.before.keys()
  assert [name for name in new if name.startswith("shapes/run/")] == []
  assert len([name for name in new if name.startswith("wan/weights/")]) == 1  # a new prompt's text


def test_a_stream_goes_on_in_the_file_that_is_there(worked):
  """Its first blocks stay as they were."""
  old = packed("shapes/stream.mp4")
  new = (worked.place("stream") / "shapes" / "stream.mp4").read_bytes()
  assert new.startswith(old) and len(new) > 2 * len(old)
