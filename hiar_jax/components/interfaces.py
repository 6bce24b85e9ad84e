"""Text encoders and autoencoders, whatever their kind: prompts in, pixels out.

A kind is two classes in one file: a config (the group `text` or `codec` of an experiment), which
fits or opens, and what it opens. `components.registry` lists the kinds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import pathlib
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.types import PyTree, Text, Video

# Networks beside the diffusion transformer: name -> (shapes of the parameters, their dtype).
NetworkSizes = Mapping[str, tuple[PyTree, str]]


class TextEncoder(Protocol):
  """Prompts -> tokens -> text.

  The tokens of a prompt are what a batch is given: word ids, or the text itself where encoding is
  too slow for the training loop.
  """

  identity: str  # of what the config does not say and that changes the numbers; '' for nothing
  negative_prompt: str  # of classifier-free guidance

  def prepare(self, prompts: Sequence[str]) -> None:
    """Encodes all prompts at once, before a loop asks for them one by one."""

  def tokens(self, prompts: Sequence[str]) -> np.ndarray:
    """Returns the tokens of n prompts, padded: ids [n l], or texts [n l d]."""

  def embed(self, tokens: jax.Array) -> Text:
    """Returns the text [n l d] of tokens, as the network reads it; jitted."""

  def rows(self, prompt: str) -> np.ndarray:
    """Returns the tokens of a prompt without padding, as a data set stores them: [l] or [l d]."""

  def warnings(self, prompt: str) -> list[str]:
    """Returns what the encoder does not know or read of a prompt, one line each."""


class Autoencoder(Protocol):
  """Pixels <-> latents, uint8 in [0, 255] outside."""

  identity: str  # as TextEncoder's

  def encode(self, video: jax.Array) -> Video:
    """Encodes a batch of training clips uint8 [b F H W 3] into latents [b f h w c]; jitted."""

  def latents(self, video: np.ndarray) -> np.ndarray:
    """Encodes whole videos uint8 [b F H W 3] into latents [b f h w c]."""

  def pieces(self, latents: jax.Array | np.ndarray) -> Iterator[np.ndarray]:
    """Decodes latents [b f h w c] into consecutive pieces uint8 [b F_i H W 3]."""

  def block_decoder(self, device: jax.Device | None = None) -> "BlockDecoder":
    """Returns the decoder of a stream, on `device`; None: where the weights are."""


class BlockDecoder(Protocol):
  """A decoder whose memory (a tree of arrays; None at a video's start) the caller holds."""

  def __call__(self, latents: jax.Array | np.ndarray, memory: PyTree) -> tuple[np.ndarray, PyTree]:
    """Returns (frames uint8 [F H W 3], memory after them) of latents [1 f h w c].

    The memory that goes in is used up.
    """

  def remember(self, leaves: list[np.ndarray], latents: tuple[int, ...]) -> PyTree:
    """Rebuilds a memory from its leaves (in the order of jax.tree.leaves), None from none.

    latents: the shape [1 f h w c] of a block.
    """


class TextEncoderConfig:
  """Base of the kinds of the group `text`; a subclass has fields `kind`, `length` and `dim`."""

  kind: str
  length: int  # tokens of a prompt
  dim: int  # width of the text
  fitted_files: ClassVar[tuple[str, ...]] = ()  # what `fit` writes

  def fit(self, directory: pathlib.Path, words: tuple[str, ...]) -> None:
    """Writes to the data's directory what is fitted on it; does nothing where that is there.

    words: those of the captions.
    """

  def open(
    self, directory: pathlib.Path, words: Callable[[], tuple[str, ...]] = tuple
  ) -> TextEncoder:
    """Returns the encoder; large weights are loaded when they are first used.

    directory: the data's. words: as `fit` has them, for directories that it never wrote to.
    Raises UserError where something is missing.
    """
    raise NotImplementedError

  @property
  def published(self) -> tuple[str, str]:
    """The directory of its converted weights and their kind; ("", "") where it is fitted."""
    return "", ""

  def with_weights(self, directory: str) -> "TextEncoderConfig":
    """Returns the config with the weights of a directory of converted ones, if it has them."""
    return self

  def networks(self) -> NetworkSizes:
    """Returns the sizes of its networks, for estimates; empty where they cost next to nothing."""
    return {}


class AutoencoderConfig:
  """Base of the kinds of the group `codec`; a subclass has these as fields or properties."""

  kind: str
  fitted: ClassVar[bool]  # on the data's clips, else published
  fitted_files: ClassVar[tuple[str, ...]] = ()  # what `fit` writes
  channels: int  # of latents
  spatial_factor: int  # pixels per latent, each way
  temporal_factor: int  # frames per latent frame; a video's first one has its own

  @property
  def label(self) -> str:
    """The name in metadata of videos."""
    return self.kind

  def latent_frames(self, frames: int) -> int:
    """Returns the latent frames of a video of `frames` pixel frames."""
    return 1 + -(-(frames - 1) // self.temporal_factor)

  def pixel_frames(self, latent: int) -> int:
    """Returns the pixel frames of a video of `latent` latent frames."""
    return 1 + (latent - 1) * self.temporal_factor

  def fit(self, directory: pathlib.Path, clips: Callable[[], np.ndarray]) -> None:
    """Writes to the data's directory what is fitted on it; does nothing where that is there.

    clips: returns uint8 [n F H W 3].
    """

  def open(self, directory: pathlib.Path) -> Autoencoder:
    """Returns the autoencoder; as TextEncoderConfig.open."""
    raise NotImplementedError

  @property
  def published(self) -> tuple[str, str]:
    """The directory of its converted weights and their kind; ("", "") where it is fitted."""
    return "", ""

  def with_weights(self, directory: str) -> "AutoencoderConfig":
    """As TextEncoderConfig.with_weights. Raises UserError where the codec is fitted by a run."""
    raise UserError(
      f"codec.kind = {self.kind!r} is fitted by a run: give --workdir, a trained run, instead of "
      "--config"
    )

  def with_options(self, decoder: str | None, tile: int | None) -> "AutoencoderConfig":
    """Returns the config with options of the command line; None keeps the config's.

    Raises UserError where this kind has no such options.
    """
    raise UserError(
      f"--decoder and --tile are for Wan's autoencoder; this run's codec is {self.kind!r}"
    )

  def networks(self) -> NetworkSizes:
    """As TextEncoderConfig.networks."""
    return {}

  def abstract_decoder(self) -> Any:
    """Returns the ChunkedDecoder with shapes for weights; None where decoding costs next to
    nothing.
    """
    return None
