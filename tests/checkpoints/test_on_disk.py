"""The page of what lies on disk is true: of a checkpoint, of weights, of an earlier version's."""

import pathlib
import tarfile

from hiar_jax.checkpoints.training_state import Checkpoints
from hiar_jax.convert import convert
from tests.helpers.disk_page import differences, files_below
from tests.helpers.published_files import original_folder
from tests.helpers.small_state import CONFIG, make

ARCHIVE = pathlib.Path(__file__).parents[1] / "golden_runs" / "files.tar.xz"


class Counter:
  def get_state(self) -> bytes:
    return b"3"


def test_a_checkpoint(tmp_path):
  state = make()
  with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
    checkpoints.save(1, state, state.params, Counter())
  assert differences("Checkpoint", files_below(tmp_path)) == (set(), set())


def test_converted_weights(tmp_path):
  list(convert(str(original_folder(tmp_path / "source")), str(tmp_path / "out")))
  there = files_below(tmp_path / "out")
  # no prompt has been encoded
  assert differences("Weights", there) == (set(), {"texts/<encoder>/<prompt>.safetensors"})
  assert {name.split("/")[0] for name in there} == {"dit", "vae", "umt5", "tokenizer"}


def test_what_an_earlier_version_wrote():
  with tarfile.open(ARCHIVE) as archive:
    names = [member.name for member in archive if member.isfile()]

  def below(folder: str) -> list[str]:
    return [name.removeprefix(folder) for name in names if name.startswith(folder)]

  assert differences("Weights", below("wan/weights/")) == (set(), set())
  assert differences("Checkpoint", below("shapes/run/teacher/checkpoints/")) == (set(), set())
  assert differences("Checkpoint", below("shapes/saved/")) == (set(), {"<step>/data/"})
  # stopped before its last stage, without TensorBoard's files, and before words, origins and starts
  # were written
  absent = {"sample/<prompt>.mp4", "sample/contact_sheet.png", "sample/metrics.json"}
  absent |= {"data/words.json", "origins/", "logs/events.out.tfevents.<host>", "logs/starts.jsonl"}
  assert differences("Workdir", below("shapes/run/")) == (set(), absent)
