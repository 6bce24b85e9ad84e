"""The flags that choose a model and change its sizes, shared by generate, stream and serve."""

import dataclasses

from absl import flags
from ml_collections import config_dict

from hiar_jax.config.command_line import define_config, define_path
from hiar_jax.errors import UserError, one_of
from hiar_jax.files import expanded
from hiar_jax.generation import video_model
from hiar_jax.generation.video_model import ModelChanges, VideoModel
from hiar_jax.training.experiment import Experiment
from hiar_jax.types import DTYPES

STAGES = ("distill", "causal_init", "framepack")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
  """Values of the flags of `define_model_flags`, by their names."""

  workdir: str | None = None
  config: config_dict.ConfigDict | None = None
  weights: str | None = None
  stage: str | None = None
  step: int | None = None
  height: int | None = None
  width: int | None = None
  dtype: str | None = None
  decoder: str | None = None
  tile: int | None = None

  def open_model(self, needed: bool = True) -> VideoModel:
    """Opens the model of `workdir`, or of `config` with `weights`.

    needed: False where the weights will not be loaded (`--dry_run`), and may be missing.

    Raises UserError where neither is given, or both, and for values that cannot be.
    """
    one_of(STAGES, stage=self.stage or STAGES[0])
    # the fields of ModelChanges are a subset of these, under the same names
    changes = ModelChanges(
      **{field.name: getattr(self, field.name) for field in dataclasses.fields(ModelChanges)}
    )
    if self.config is not None:
      if self.step is not None:
        raise UserError(f"--step={self.step} is of a --workdir; converted weights have no steps")
      if self.workdir:
        raise UserError("give either --workdir, a trained run, or --config with --weights")
      weights = self.weights and expanded(self.weights)
      return video_model.from_config(self.config, weights, changes, needed=needed)
    if not self.workdir:
      raise UserError(
        "--workdir is missing; give the directory of a trained run, as --workdir=runs/shapes (or "
        "--config and --weights)"
      )
    if self.weights:
      raise UserError(
        "--weights needs --config, the config of the model; a --workdir has weights of its own"
      )
    return video_model.from_workdir(
      expanded(self.workdir), self.stage, changes, step=self.step, needed=needed
    )


def define_model_flags() -> None:
  """Defines an absl flag for each field of `ModelOptions`."""
  define_config("with --weights: a Python file with get_config(), and a variant", Experiment)
  define_path(
    "weights",
    None,
    "converted weights: a directory with dit/, and vae/, umt5/, tokenizer/ unless the config has "
    "them",
  )
  define_path("workdir", None, "directory of a run made by hiar_jax.train")
  flags.DEFINE_enum(
    "stage", None, STAGES, "stage of the run whose weights are used; default: its last one"
  )
  flags.DEFINE_integer(
    "step",
    None,
    "step of the stage's checkpoint, of a stage that is not finished too; default: its last one",
    0,
  )
  flags.DEFINE_integer("height", None, "height of the video in pixels; default: the config's", 1)
  flags.DEFINE_integer("width", None, "width of the video in pixels; default: the config's", 1)
  flags.DEFINE_enum(
    "dtype", None, DTYPES, "dtype of weights and matrix products; default: the config's"
  )
  flags.DEFINE_enum(
    "decoder", None, video_model.DECODERS, "decode with Wan's autoencoder or with the tiny one"
  )
  flags.DEFINE_integer(
    "tile",
    None,
    "encode and decode in tiles of so many latents a side, for small memories; 0: whole frames",
    0,
  )
