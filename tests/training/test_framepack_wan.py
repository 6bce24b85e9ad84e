"""FramePack on Wan from a folder of videos: small random weights of its layout, clips encoded once
by its VAE, the framepack stage on their latents, videos.
"""

import dataclasses
import functools
import re
import runpy
import shutil

import jax
import numpy as np
from PIL import Image
import pytest

from experiments import wan_framepack
from hiar_jax.checkpoints import weights
from hiar_jax.config.building import build
from hiar_jax.config.workdir import save_resolved
from hiar_jax.data import tfds_builder, video_folder
from hiar_jax.errors import UserError
from hiar_jax.models import vae
from hiar_jax.training import prepared_data, samples, stages
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.run import open_run
from hiar_jax.video.mp4 import write_mp4
from hiar_jax.video.video_file import Sampling
from tests.helpers import tiny_run
from tests.helpers.tiny_wan import DIT, VAE, directory, random_like
from tests.helpers.video_reader import read_mp4

CONFIG = """
from hiar_jax.experiments import wan_framepack

def get_config():
  c = wan_framepack.get_config()
  c.data.update(folder="{place}/clips", size=(16, 32), frames=21)
  c.weights.base = c.codec.weights = c.text.weights = "{place}/weights"
  c.model.update(dim=32, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=16)
  c.model.update(dtype="float32", remat="none")
  c.text.dim, c.text.length, c.text.dtype = 16, 64, "float32"
  c.history.block = 2
  c.framepack.update(packing="td_f2k2f1k1_g2", steps=2, batch=2, accumulate=1)
  c.sample.update(count=2, length=2.0, steps=2)
  c.mesh.update(data=-1, fsdp=1)
  c.log.update(every=1, preview_every=10, checkpoint_every=1)
  return c
"""
PAGE = (tiny_run.ROOT / "docs" / "framepack.md").read_text()
# of each video, at 16 a second; a clip takes 21
FRAMES = {"cat": 24, "dog": 43, "waves": 21}
CAPTIONS = ["a film of cat", "a film of dog", "a film of dog", "a film of waves"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  root = tmp_path_factory.mktemp("wan_framepack")
  (root / "config.py").write_text(CONFIG.format(place=root))
  shutil.copytree(directory(tmp_path_factory.getbasetemp()) / "weights", root / "weights")
  (root / "clips").mkdir()
  for seed, (name, frames) in enumerate(FRAMES.items()):
    # colours that drift, in patches that a video codec keeps
    start = np.random.default_rng(seed).integers(0, 200, (1, 2, 4, 3))
    video = start + 2 * np.arange(frames)[:, None, None, None]
    video = video.clip(0, 255).astype(np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    write_mp4(root / "clips" / f"{name}.mp4", video, 16)
    (root / "clips" / f"{name}.txt").write_text(f"a film of {name}")
  return root


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
  return tiny_run.chain(tmp_path_factory.getbasetemp())


def config(place, **changes):
  """For this process, on all its devices; names with __ for dots."""
  c = runpy.run_path(str(place / "config.py"))["get_config"]()
  changes = {"framepack__batch": 8, **changes}
  c.update_from_flattened_dict({name.replace("__", "."): x for name, x in changes.items()})
  return c


@functools.cache
def data_stage(place):
  """A workdir after its data stage."""
  few = config(place, framepack__batch=4)  # no more than there are clips
  run = open_run(few, place / "data_alone", save=False)
  stages.prepare_data(run)
  return run


@pytest.mark.slow
def test_clips_become_latents_of_the_vae(place):
  """Those of each clip alone, as the folder has it; texts are encoded too."""
  run = data_stage(place)
  source = tfds_builder.open_source(run.directory("data"))
  assert [source[i]["caption"].decode() for i in range(len(source))] == CAPTIONS
  assert [int(source[i]["start"]) for i in range(4)] == [0, 0, 21, 0]
  sampling = Sampling(21, 16, 32, 16.0, 21)
  cut = video_folder.Cut(sampling, pieces=False)
  films = video_folder.scan(place / "clips", cut)
  pixels = np.stack([clip["video"] for clip in video_folder.records(films, cut)])
  for i in range(4):
    found = source[i]["latents"]
    assert found.shape == (6, 2, 4, 16) and found.dtype == np.float32
    np.testing.assert_array_equal(found, run.autoencoder.latents(pixels[i : i + 1])[0])
  encoder = run.text_encoder
  assert not encoder.missing([*CAPTIONS, encoder.negative_prompt])


def test_a_batch_is_what_is_stored(place):
  run = data_stage(place)
  batch = next(run.clips("data", 4, ("latents",), salt=7))
  encoded = run.encode(batch)
  source = tfds_builder.open_source(run.directory("data"))
  stored = {source[i]["latents"].tobytes() for i in range(4)}
  assert {np.asarray(row).tobytes() for row in encoded["latents"]} == stored
  assert encoded["text"].shape == (4, 64, 16)


def with_data_of(workdir, data, c):
  """A run on another one's data, its config saved."""
  save_resolved(c, workdir)
  (workdir / "data").symlink_to(data)
  return open_run(c, workdir, save=False)


def test_centroids_and_first_frames_come_from_the_stored_latents(place, tmp_path):
  data = data_stage(place).directory("data")
  source = tfds_builder.open_source(data)
  stored = np.stack([source[i]["latents"] for i in range(4)])
  np.testing.assert_array_equal(prepared_data.spread_latents(data), stored)
  c = config(place, framepack__packing="f1k1_x_g2_f1k1f2k2_td", framepack__given=1)
  c.data.frames, c.framepack.orders, c.sample.order = 25, ("inverted",), "inverted"
  run = with_data_of(tmp_path / "inverted", data, c)
  (starts,) = samples.true_starts(run, [CAPTIONS[3], CAPTIONS[0]], [0, 1])
  np.testing.assert_array_equal(starts, stored[[3, 0], :1])


def test_another_vae_under_the_data_is_refused(place, tmp_path):
  """Also under data that another run made; the same weights in another folder are no other VAE."""
  data, folder = data_stage(place).directory("data"), tmp_path / "weights"
  shutil.copytree(place / "weights", folder)
  few = {"codec__weights": str(folder), "framepack__batch": 4}
  own = with_data_of(tmp_path / "own", data, config(place, **few))
  c = config(place, **few, stages_from=str(tmp_path / "own"))
  borrower = open_run(c, tmp_path / "borrower", save=False)
  before = tiny_run.files(data)
  for run in (own, borrower):
    stages.prepare_data(run)
  weights.save(folder, "vae", VAE, jax.device_get(vae.init(VAE, jax.random.key(9))))
  for run in (own, borrower):
    with pytest.raises(UserError, match="made with codec='.*', but this run wants codec='") as line:
      stages.prepare_data(dataclasses.replace(run))  # which opens its autoencoder anew
    assert "\n" not in str(line.value)
  assert tiny_run.files(data) == before


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"weights__base": "nowhere"}, "nowhere"),
    ({"codec__weights": "nowhere"}, "nowhere"),
    ({"text__weights": "nowhere"}, "nowhere"),
    ({"model__num_layers": 3}, "num_layers 2, not 3"),
    ({"data__folder": "nowhere"}, "data.folder = 'nowhere' is not a folder"),
    ({"data__frames": 45}, "all 3 were skipped, the first as cat.mp4: too short: 24 frames at 16"),
  ],
)
def test_what_is_missing_is_one_line_before_anything_is_encoded(place, tmp_path, changes, message):
  with pytest.raises(UserError, match=message) as line:
    stages.prepare_data(open_run(config(place, **changes), tmp_path / "run"))
  assert "\n" not in str(line.value)
  assert not (tmp_path / "run" / "data" / "parts").exists()


# ------------------------------------------------------------------------------ the whole of it


def train(chain, place, workdir, die: str = ""):
  start = ["-c", tiny_run.VICTIM, die] if die else ["-m", "hiar_jax.train"]
  return chain.python(*start, f"--config={place}/config.py", f"--workdir={workdir}")


@pytest.fixture(scope="module")
def trained(chain, place):
  done = train(chain, place, place / "run")
  assert done.returncode == 0, done.stderr
  return place / "run"


@pytest.mark.slow
def test_it_trains_and_makes_videos(trained, place):
  assert {path.name for path in trained.iterdir()} == {
    "config.json",
    "data",
    "framepack",
    "logs",
    "origins",
    "sample",
  }
  records = tiny_run.log(trained)
  assert {record["stage"] for record in records} == {"framepack"}
  assert all(np.isfinite(list(record["scalars"].values())).all() for record in records)
  videos = tiny_run.videos(trained)
  assert len(videos) == 2 and {len(video) for video in videos.values()} == {45}
  # trained, from the base: every matrix has moved, packed projections too
  state = tiny_run.state(trained, "framepack", 2)
  base = weights.load(place / "weights", "dit")[1]
  kernel = "params/layers/mlp_in/kernel"
  assert (state[kernel] != np.asarray(base["layers"]["mlp_in"]["kernel"])).any()
  assert {f"params/packed_k{pool}/kernel" for pool in (1, 2)} <= state.keys()


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_numbers(chain, place, trained):
  """Killed when the latents' data set gets its name, then between two updates."""
  workdir = place / "killed"
  for die, status in (("os.rename:latents/float32:1", -9), ("step::1", 143)):
    done = train(chain, place, workdir, die)
    assert done.returncode == status, done.stderr
  done = train(chain, place, workdir)
  assert done.returncode == 0, done.stderr
  states = [tiny_run.state(one, "framepack", 2) for one in (workdir, trained)]
  tiny_run.assert_same_arrays(*states)
  assert tiny_run.log(workdir) == tiny_run.log(trained)
  tiny_run.assert_same_arrays(tiny_run.videos(workdir), tiny_run.videos(trained))


@pytest.mark.slow
def test_it_generates_and_goes_back_to_diffusers(chain, place, trained):
  """From the run, and from exported weights; longer than a clip; the same as the sample stage's."""
  prompt = f"--prompt={CAPTIONS[0]}"
  out = place / "videos"
  cases = [
    [f"--workdir={trained}", prompt, "--seed=0", "--frames=45", f"--out={out}/same.mp4"],
    [f"--workdir={trained}", prompt, "--frames=33", f"--image={out}/cat.png", f"--out={out}/i.mp4"],
    [f"--workdir={trained}", "--frames=45", "--dry_run"],
  ]
  out.mkdir()
  Image.fromarray(np.full((16, 32, 3), 90, np.uint8)).save(out / "cat.png")
  done = chain.commands([("hiar_jax.generate", case) for case in cases])
  assert [status for status, _, _ in done] == [0, 0, 0], done
  sample = tiny_run.videos(trained)
  found = read_mp4(out / "same.mp4")[0]
  assert any((found == video).all() for video in sample.values())
  assert "history: td_f2k2f1k1_g2" in done[2][1]


HELIOS = CONFIG.replace(
  "  c.sample",
  """  c.framepack.update(packing="f1k1_x_td_f4k4f2k2f1k1_g2", published=True)
  c.framepack.update(history_level="clean", hears=False)
  c.sample""",
  1,
)


@pytest.mark.slow
def test_a_converted_helios_generates(chain, place):
  """With the lines of docs/framepack.md: kernels k1, k2, k4, the first frame kept for ever."""
  (place / "helios.py").write_text(HELIOS.format(place=place))
  config = dataclasses.replace(DIT, packing=(1, 2, 4))
  helios = random_like(config, type(config).init, 7, 0.2)
  weights.save(place / "helios", "dit", config, helios)
  command = [f"--config={place}/helios.py", f"--weights={place}/helios", f"--prompt={CAPTIONS[0]}"]
  out = place / "helios.mp4"
  ((status, _, errors),) = chain.commands(
    [("hiar_jax.generate", [*command, "--frames=29", f"--out={out}"])]
  )
  assert status == 0, errors
  frames = read_mp4(out)[0]
  assert len(frames) == 29 and frames.std() > 1
  (lines,) = re.findall(r"Helios\n.*?```python\n(.*?)```", PAGE, re.DOTALL)
  for line in lines.splitlines():
    assert line.replace("f16k4", "f4k4").replace("g9", "g2") in HELIOS


# ------------------------------------------------------------------------------------ its page


def test_the_page_names_whole_sections_and_fields_that_exist():
  e = build(Experiment, wan_framepack.get_config())
  section = PAGE[PAGE.index("## On Wan") :]
  (other,) = re.findall(r"`--config.data.frames=(\d+)`, (\d+) or (\d+)", section)
  lengths = [e.data.frames, *map(int, other)]
  assert [e.framepack.sections(e.codec.latent_frames(n)) for n in lengths] == [4, 3, 2, 1]
  assert all(e.codec.pixel_frames(e.codec.latent_frames(n)) == n for n in lengths)
  (frames,) = re.findall(r"--frames=(\d+)", section)
  assert e.framepack.sections(e.codec.latent_frames(int(frames))) == 8
  size = int(np.prod(e.latent.clip)) * 4
  assert f"{size / 1e6:.1f} MB a clip" in section
  c = wan_framepack.get_config()
  for name, value in re.findall(r"--config\.([\w.]+)=([\w]+)", section):
    c.update_from_flattened_dict({name: type(c[name.split(".")[0]][name.split(".")[1]])(value)})
