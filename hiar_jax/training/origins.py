"""What a run's weights mean something with: the words and the codec that were fitted on its data,
and the published weights that took part.

    <workdir>/origins/words.json, codec.npz     copies of what lies in data/
    <workdir>/origins/weights.json              {"weights.base": fingerprint, ...}

With them a run makes videos without its data set. Data or published weights that were changed under
a run that has been trained are refused: the ids of words, the latents or the teacher would be
others than those that it has learnt from.
"""

from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib

import numpy as np

from hiar_jax.checkpoints import weights
from hiar_jax.checkpoints.on_disk import CHECKPOINTS
from hiar_jax.components.interfaces import AutoencoderConfig, TextEncoderConfig
from hiar_jax.config.workdir import read_resolved
from hiar_jax.errors import UserError
from hiar_jax.files import reading, write_atomic
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.lineage import first_stage
from hiar_jax.training.places import lost

FOLDER = "origins"  # of a workdir
WEIGHTS = "weights.json"
ROUNDING = 1e-3  # of an array's largest number: another machine fits the same codec otherwise


@dataclasses.dataclass(frozen=True)
class Origins:
  """What a run keeps of them, and where they come from.

  made: directories in which what is fitted on the data may lie, the nearest first: the data's, and
  before it the origins of the run whose stages are borrowed.
  """

  experiment: Experiment
  workdir: pathlib.Path
  made: tuple[pathlib.Path, ...]

  @property
  def kept(self) -> pathlib.Path:
    return self.workdir / FOLDER

  def holder(self, config: AutoencoderConfig | TextEncoderConfig) -> pathlib.Path:
    """Returns the directory that a codec or text encoder is opened from: the first that holds what
    it has fitted, the data's where none does.
    """
    for directory in (self.kept, *self.made):
      files = [directory / name for name in config.fitted_files]
      if files and all(file.exists() for file in files):
        return directory
    return self.made[-1]

  def check(self, lent: Sequence[str] | None = None) -> None:
    """Raises UserError where the run has been trained with other words, another codec or other
    weights than those of now. lent: only weights that these stages depend on; None: all.
    """
    if not self._trained or not (self.kept / WEIGHTS).exists():  # earlier versions kept nothing
      return
    advice = "use another --workdir, or what it was trained with"
    before, now = json.loads((self.kept / WEIGHTS).read_text()), self._fingerprints()
    for name in before.keys() & now.keys():
      if before[name] != now[name] and (lent is None or first_stage(name) in lent):
        raise UserError(
          f"{name}: these are other weights than those that {self.workdir} was trained with "
          f"(fingerprint {before[name]}, now {now[name]}); {advice}"
        )
    for name, path in self._fitted().items():
      if (self.kept / name).exists() and not _same(self.kept / name, path):
        raise UserError(
          f"{path} is not the one that {self.workdir} was trained with: the data has changed under "
          f"the run; {advice}"
        )

  def forget(self) -> None:
    """Removes what a run that is not trained yet has kept of other data."""
    if not self._trained:
      now = self._content()
      for path in self.kept.glob("*"):
        if path.read_bytes() != now.get(path.name):
          path.unlink()

  def keep(self) -> None:
    """Writes what is not kept yet."""
    for name, text in self._content().items():
      if not (self.kept / name).exists():
        write_atomic(self.kept / name, text)

  @property
  def _trained(self) -> bool:
    """True where something was made that depends on them."""
    steps = (path.name for path in self.workdir.glob(f"*/{CHECKPOINTS}/*"))
    made = any((self.workdir / name).exists() for name in ("trajectories", "codebook"))
    return made or any(step.isdigit() for step in steps)

  def _content(self) -> dict[str, bytes]:
    """Returns {file: content} of what there is to keep now."""
    content = {name: path.read_bytes() for name, path in self._fitted().items()}
    return content | {WEIGHTS: (json.dumps(self._fingerprints(), indent=2) + "\n").encode()}

  def _fitted(self) -> dict[str, pathlib.Path]:
    """Returns {name: path} of the files that were fitted on the data of now."""
    names = (*self.experiment.text.fitted_files, *self.experiment.codec.fitted_files)
    places = {name: [folder / name for folder in self.made] for name in names}
    found = {name: [p for p in paths if p.exists()] for name, paths in places.items()}
    return {name: paths[0] for name, paths in found.items() if paths}

  def _fingerprints(self) -> dict[str, str]:
    """Returns those of the published weights that take part, where they are there."""
    e = self.experiment
    given = {
      "weights.base": (e.weights.base, e.dit.kind),
      "weights.teacher": (e.weights.teacher, e.teacher_dit.kind),
      "weights.student": (e.weights.student, e.stored_student.kind),
      "codec.weights": e.codec.published,
      "text.weights": e.text.published,
    }
    return {
      name: weights.describe(directory, kind).fingerprint
      for name, (directory, kind) in given.items()
      if directory and weights.exists(directory, kind)
    }


def moved(workdir: str | os.PathLike) -> set[str]:
  """Returns the fields of published weights that are no longer where a workdir's config says, and
  are told by their fingerprints.
  """
  kept, stored = pathlib.Path(workdir) / FOLDER / WEIGHTS, read_resolved(workdir)
  if stored is None or not kept.exists():
    return set()
  return json.loads(kept.read_text()).keys() & lost(stored, workdir)


def _same(a: pathlib.Path, b: pathlib.Path) -> bool:
  """True for equal files, and for arrays that differ by rounding."""
  if a.read_bytes() == b.read_bytes():
    return True
  if a.suffix != ".npz":
    return False
  with reading(f"{a} or {b}", "remove what is damaged"), np.load(a) as first, np.load(b) as second:
    return first.files == second.files and all(
      first[name].shape == second[name].shape
      and np.abs(first[name] - second[name]).max() <= ROUNDING * np.abs(first[name]).max()
      for name in first.files
    )
