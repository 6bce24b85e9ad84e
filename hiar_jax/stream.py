"""Video as a stream, from Python and from the command line: block by block, without end or up to a
length.

    for chunk in hiar_jax.stream(workdir="runs/shapes", prompt="a red circle moving left"):
      show(chunk.frames)                                     # uint8 [n H W 3]

    python -m hiar_jax.stream --workdir=runs/shapes --prompt="a red circle" --out=clip.mp4
    python -m hiar_jax.stream --workdir=runs/shapes --frames=200 --out=frames/ \
      --timeline="0s: a red circle, 10s: a blue square"

The mp4 plays while it grows. Ctrl-C ends it after the block at hand; `--save=DIR` keeps the blocks
in flight, and `--resume=DIR` continues from there, also on another number of devices.
"""

from collections.abc import Collection, Mapping
import contextlib
from contextlib import AbstractContextManager
import dataclasses
import pathlib
import sys
import types
from typing import Any

from absl import flags

from hiar_jax import peak_memory
from hiar_jax.config import command_line as configs
from hiar_jax.config.building import as_fields, nearest
from hiar_jax.errors import UserError, without_flags
from hiar_jax.files import check_name
from hiar_jax.generation import prompts_file
from hiar_jax.generation import timeline as timelines
from hiar_jax.generation.conditioning_frames import Conditioning
from hiar_jax.generation.model_options import ModelOptions, define_model_flags
from hiar_jax.method import SINK_POSITIONS
from hiar_jax.preemption import Preemption
from hiar_jax.progress import Progress
from hiar_jax.streaming.compiled_tick import TickOptions as EngineOptions
from hiar_jax.streaming.layout import Layout
from hiar_jax.streaming.producer import Stream
from hiar_jax.streaming.streaming_model import StreamingModel
from hiar_jax.video.fragmented_mp4 import FragmentedMP4
from hiar_jax.video.png import PNGFolder

ENDLESS = "endless"

# Earlier names of flags and options, which still work; see config.command_line.
RENAMED = {
  "stages": "level_devices",
  "tensor": "tensor_devices",
  "sequence": "sequence_devices",
  "sink_place": ("sink_positions", {"true": "absolute", "carried": "relative"}),
  "ahead": "prefetch",
  "memory": "report_memory",
}


@dataclasses.dataclass(frozen=True)
class StreamOptions(ModelOptions):
  """Options of a stream, named as the flags; `--help` describes them."""

  prompt: str | None = None
  timeline: str | None = None
  image: str | None = None
  video: str | None = None
  frames: int | str = ENDLESS
  seed: int = 0
  resume: str | None = None
  level_devices: int | None = None
  tensor_devices: int | None = None
  sequence_devices: int | None = None
  window: int | None = None
  sink: int | None = None
  sink_positions: str = "absolute"
  prefetch: int = 2

  @property
  def start(self) -> Conditioning | None:
    """The file that the video starts from. Raises UserError for two of them."""
    if self.image and self.video:
      raise UserError("give either image or video: a stream starts from one of them")
    return Conditioning.of(self.image, self.video)

  @property
  def length(self) -> int | None:
    """Frames of the video; None: without end. Raises UserError for anything else."""
    if self.frames == ENDLESS:
      return None
    try:
      frames = int(self.frames)
    except ValueError:
      raise UserError(
        f"frames = {self.frames!r}: expected a whole number, or {ENDLESS!r}"
      ) from None
    if frames < 1:
      raise UserError(f"frames = {frames}: expected at least 1")
    return frames

  @property
  def engine(self) -> EngineOptions:
    """Layout, window and sink. Raises UserError for fewer than one device on an axis."""
    axes = {
      "level": self.level_devices,
      "tensor": self.tensor_devices,
      "sequence": self.sequence_devices,
    }
    given = {name: size for name, size in axes.items() if size is not None}
    return EngineOptions(
      Layout(**given) if given else None, self.window, self.sink, self.sink_positions
    )


@without_flags
def stream(**options) -> Stream:
  """Returns an iterator of chunks: frames uint8 [n H W 3], block, prompt, time. The options are the
  fields of StreamOptions, as the command's flags.

  `.change_prompt(text)`, `.pause()`, `.extend(blocks)`, `.save(directory)` and `.close()` act on it
  while it runs. Raises UserError for options that are unknown or do not fit.
  """
  wanted = read_options(options)
  return open_stream(open_source(wanted), wanted)


def read_options(options: Mapping[str, Any], without: Collection[str] = ()) -> StreamOptions:
  """Returns checked options, also from earlier names. Raises UserError for an unknown one.

  without: names of fields that do not count here.
  """
  options = configs.with_new_names(options, RENAMED)
  known = [f.name for f in dataclasses.fields(StreamOptions) if f.name not in without]
  unknown = sorted(options.keys() - set(known))
  if unknown:
    raise UserError(f"stream has no option {unknown[0]!r}; {nearest(unknown[0], known)}")
  wanted = StreamOptions(**as_fields(StreamOptions, options))
  check(wanted)
  return wanted


def check(options: StreamOptions) -> None:
  """Raises UserError for all that is wrong with options, before anything is loaded."""
  options.length, options.start, options.engine  # noqa: B018  (each raises for its own options)
  prompts_file.check_seed(options.seed)
  if options.prompt is not None:
    prompts_file.check_prompt(options.prompt)
  if options.timeline is not None:
    timelines.read(options.timeline)
  if options.resume is None and (options.prompt is None) == (options.timeline is None):
    raise UserError(
      'give either --prompt="a red circle moving left" or --timeline="0s: a red circle, 10s: a '
      'blue square"'
    )
  if options.resume is not None and (options.prompt is not None or options.start):
    raise UserError(
      "--resume goes on with what was saved: leave --prompt, --image and --video out (a "
      "--timeline may say what comes later)"
    )


def open_source(options: StreamOptions) -> StreamingModel:
  """Loads the model of the options."""
  return StreamingModel(options.open_model(), options.engine)


def open_stream(source: StreamingModel, options: StreamOptions) -> Stream:
  """Opens a new stream of a model, or resumes the one of `options.resume`."""
  timeline = None if options.timeline is None else timelines.read(options.timeline)
  if options.resume is not None:
    return source.resume(
      options.resume, timeline=timeline, frames=options.length, prefetch=options.prefetch
    )
  return source.open(
    options.prompt,
    timeline=timeline,
    seed=options.seed,
    frames=options.length,
    start=options.start,
    prefetch=options.prefetch,
  )


class _Callable(types.ModuleType):
  """A module that can be called: `hiar_jax.stream(...)` and `python -m hiar_jax.stream` are one."""

  def __call__(self, **options) -> Stream:
    return stream(**options)


# -------------------------------------------------------------------------------------- the command


def write(options: StreamOptions, out: str, save: str | None = None) -> pathlib.Path:
  """Streams into an mp4 or a directory of pictures, up to the end or to SIGINT or SIGTERM.

  Returns the path. save: directory of the snapshot. Raises UserError where the file exists already.
  """
  path = pathlib.Path(out)
  if path.suffix not in (".mp4", ""):
    raise UserError(f"--out={out}: expected a name that ends in .mp4, or a directory for pictures")
  if path.exists() and options.resume is None and not path.is_dir():
    raise UserError(f"{path} is there already; give another name, or remove it")
  if save:
    check_name(save, f"--save={save}", checkpoints=True)
  check(options)
  source = open_source(options)
  # Chunks that are taken are written at once, so the snapshot continues where the file ends.
  with (
    open_stream(source, options) as running,
    _open_out(path, running, source, options) as file,
    Preemption() as stop,
  ):
    with Progress("stream", options.length, running.taken, unit="frame") as bar:
      for chunk in running:
        file.write(chunk.frames)
        bar.update(running.taken, block=chunk.block, seconds=round(chunk.time, 1))
        if stop.requested(chunk.block):
          break
    if save:
      running.save(save)
      print(f"saved to {save}; --resume={save} goes on from there", file=sys.stderr)
  print(path, flush=True)
  return path


def _open_out(
  path: pathlib.Path, running: Stream, source: StreamingModel, options: StreamOptions
) -> AbstractContextManager[FragmentedMP4 | PNGFolder]:
  """Opens the output: a new one, or with --resume the one that is there, to append to."""
  resumed = options.resume is not None and path.exists()
  # frames behind the snapshot (the process ran on after it was saved) are cut off
  keep = running.taken if resumed else None
  if path.suffix != ".mp4":
    return contextlib.nullcontext(PNGFolder(path, keep=keep))
  metadata = source.provenance(running.prompt, running.seed, options.start)
  if options.timeline is not None:
    metadata["timeline"] = timelines.read(options.timeline).text()
  return FragmentedMP4(path, source.fps, metadata, scale=source.scale, keep=keep)


def main() -> None:
  options = StreamOptions(
    **{field.name: getattr(flags.FLAGS, field.name) for field in dataclasses.fields(StreamOptions)}
  )
  write(options, flags.FLAGS.out, flags.FLAGS.save)
  if flags.FLAGS.report_memory:
    print(peak_memory.report(*peak_memory.peak()), file=sys.stderr)


def define_flags() -> None:
  """Defines the command's flags."""
  define_stream_flags()
  flags.DEFINE_string("prompt", None, "text of the video")
  flags.DEFINE_string(  # a text, or a path: timeline.read tells them apart
    "timeline",
    None,
    "prompts by the second, as '0s: a red circle, 10s: a blue square', or a file of them",
  )
  configs.define_path("image", None, "picture that becomes the first frame")
  configs.define_path(
    "video",
    None,
    "video to continue: the most whole blocks at its end are kept, and the new frames follow",
  )
  flags.DEFINE_string(
    "frames",
    ENDLESS,
    "frames of the video, rounded up to whole blocks; 'endless': until it is stopped",
  )
  flags.DEFINE_integer("seed", 0, "random seed of the noise", 0, prompts_file.MAX_SEED)
  configs.define_path(
    "out", "stream.mp4", "an mp4 that plays while it grows, or a directory for pictures"
  )
  configs.define_path("save", None, "directory to save the stream in, so that it can be resumed")
  configs.define_path("resume", None, "directory that --save wrote, to resume from")
  flags.DEFINE_integer(
    "prefetch", 2, "blocks that may wait for the decoder, and again for the file", 1
  )
  flags.DEFINE_bool("report_memory", False, "print the most memory that was used")


def define_stream_flags() -> None:
  """Defines the flags of the model and of its layout over devices, which serve has too."""
  define_model_flags()
  flags.DEFINE_integer(
    "level_devices", None, "devices that share the noise levels; default: as many as can be used", 1
  )
  flags.DEFINE_integer("tensor_devices", None, "devices that share the network of a level", 1)
  flags.DEFINE_integer("sequence_devices", None, "devices that share each frame of a level", 1)
  flags.DEFINE_integer(
    "window", None, "latent frames that a block sees, itself included; default: the config's", 1
  )
  flags.DEFINE_integer(
    "sink", None, "latent frames at the start that every block sees; default: the config's", 0
  )
  flags.DEFINE_enum(
    "sink_positions",
    "absolute",
    SINK_POSITIONS,
    "positions of the sink: absolute, or relative to the window (carried along with it)",
  )


if __name__ == "__main__":
  define_flags()
  configs.run_flags(main, renamed=RENAMED)
else:
  sys.modules[__name__].__class__ = _Callable
