"""What the stages share: a run and its directories, prompts and names. The loop: test_loop.py.

The chain itself is in test_train.py.
"""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from hiar_jax.config.workdir import save_resolved
from hiar_jax.data import tfds_builder
from hiar_jax.errors import UserError
from hiar_jax.training import loop, prepared_data, samples, stages, updates
from hiar_jax.training.run import Run, open_run, read_config
from tests.helpers import tiny_run
from tests.helpers.tiny_run import EIGHT, make_run


@pytest.fixture(scope="module")
def with_data(tmp_path_factory) -> Run:
  run = make_run(tmp_path_factory.mktemp("with_data"))
  stages.prepare_data(run)
  return run


# --------------------------------------------------------------------------------- run, directories


def test_stages_come_from_another_workdir_up_to_causal_init(tmp_path):
  save_resolved(tiny_run.make_config(**EIGHT), tmp_path / "first")
  run = make_run(tmp_path / "second", stages_from=str(tmp_path / "first"))
  for stage in ("data", "teacher", "trajectories", "causal_init"):
    assert run.directory(stage) == tmp_path / "first" / stage and run.borrows(stage)
  for stage in ("distill", "sample"):
    assert run.directory(stage) == tmp_path / "second" / stage and not run.borrows(stage)


@pytest.mark.parametrize(
  ("changes", "borrows"),
  [
    ({"history__level": "clean", "history__order": "block_first"}, False),
    ({"history__window": 6}, False),
    ({"history__level": "input"}, False),
    ({"history__level": "input", "causal_init__shows": "noisy"}, True),
    ({"history__gradient": "attached"}, True),  # none reaches the past in causal init
    ({"distill__lr": 0.5}, True),
  ],
)
def test_a_method_that_sees_another_past_learns_to_read_it(tmp_path, changes, borrows):
  """Its causal init is its own; earlier versions borrowed that too, and such a run goes on."""
  shows = {name: value for name, value in changes.items() if name == "causal_init__shows"}
  save_resolved(tiny_run.make_config(**EIGHT, **shows), tmp_path / "first")
  changes = {"stages_from": str(tmp_path / "first"), **changes}
  run = make_run(tmp_path / "second", **changes)
  assert run.borrows("trajectories") and run.borrows("causal_init") == borrows
  (tmp_path / "second" / "distill").mkdir()
  assert make_run(tmp_path / "second", **changes).borrows("causal_init")
  (tmp_path / "second" / "causal_init").mkdir()
  assert make_run(tmp_path / "second", **changes).borrows("causal_init") == borrows


def test_a_workdir_keeps_its_config_and_what_may_change_is_free(tmp_path):
  make_run(tmp_path)
  make_run(tmp_path, log__every=7, sample__count=2, mesh__data=8)
  assert read_config(tmp_path).log.every == 7
  tiny_run.pretend(tmp_path, "teacher", 2)
  with pytest.raises(UserError, match="belongs to another config .*teacher.lr: "):
    make_run(tmp_path, teacher__lr=0.5)


def test_reading_a_run_leaves_it_alone_and_takes_any_devices(tmp_path):
  save_resolved(tiny_run.make_config(mesh__data=3), tmp_path)
  before = tiny_run.files(tmp_path)
  run = open_run(read_config(tmp_path), tmp_path, save=False)
  assert tiny_run.files(tmp_path) == before and not (tmp_path / "logs").exists()
  assert run.mesh.size == 8


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"teacher__batch": 12}, "teacher.batch = 12 must be a multiple of 8"),
    (
      {"causal_init__batch": 4},
      "causal_init.batch = 4 must be a multiple of 8 .* the nearest is 8",
    ),
    (
      {"distill__batch": 24, "distill__accumulate": 2},
      "distill.batch = 24 must be a multiple of 16",
    ),
    ({"causal_init__batch": 16}, "causal_init.batch = 16 is more than trajectories.count = 8"),
    ({"distill__batch": 16}, "distill.batch = 16 is more than trajectories.count = 8"),
    ({"sample__prompts": "nowhere.txt"}, "prompts file nowhere.txt does not exist"),
    ({"mesh__data": 3}, "mesh data = 3, fsdp = 1 does not fit 8 devices"),
  ],
)
def test_what_a_late_stage_would_trip_over_is_said_at_once(tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    make_run(tmp_path / "w", **changes)
  assert not (tmp_path / "w").exists()
  if changes == {"distill__batch": 16}:
    # then it needs no trajectories
    make_run(tmp_path / "w", **changes, distill__forward_kl__weight=0.0)


def test_stages_from_must_hold_the_same_config(tmp_path):
  with pytest.raises(UserError, match="holds no run; give a workdir that went through causal_init"):
    make_run(tmp_path / "w", stages_from=str(tmp_path))
  save_resolved(tiny_run.make_config(**EIGHT, data__seed=5), tmp_path / "other")
  with pytest.raises(
    UserError, match=r"made with another config \(stored -> given: data.seed: 5 -> 0\)"
  ):
    make_run(tmp_path / "w", stages_from=str(tmp_path / "other"))
  (tmp_path / "foreign").mkdir()
  (tmp_path / "foreign" / "config.json").write_text("{}")
  with pytest.raises(UserError, match="made with another config"):
    make_run(tmp_path / "w", stages_from=str(tmp_path / "foreign"))
  save_resolved(
    tiny_run.make_config(**EIGHT, distill__lr=0.5, history__gradient="attached"), tmp_path / "first"
  )
  # what comes after causal init may differ
  make_run(tmp_path / "w", stages_from=str(tmp_path / "first"))


def test_keys_are_of_one_generator_whatever_the_setting(tmp_path):
  """Under the others an example's draws depend on its neighbours in the batch."""
  run = make_run(tmp_path)
  keys = lambda: [run.noise_key, updates.stage_key(run.experiment, "distill")]
  usual = keys()
  with jax.default_prng_impl("unsafe_rbg"):
    assert keys() == usual and all(jax.random.key_impl(key) == "threefry2x32" for key in keys())


def test_a_batch_is_encoded_at_the_loop_s_mouth(with_data):
  """Tokens become text and videos latents, once, before a step sees them."""
  run = open_run(read_config(with_data.workdir), with_data.workdir, save=False)
  batch = next(run.clips("data", 4, ("video",), salt=1))
  encoded = run.encode(batch)
  assert encoded.keys() - batch.keys() == {"text", "latents"}
  assert batch.keys() - encoded.keys() == {"tokens", "video"}
  assert encoded["latents"].shape == (4, *run.experiment.latent.clip) == (4, 4, 2, 2, 8)
  np.testing.assert_array_equal(encoded["text"], run.text_encoder.embed(batch["tokens"]))
  # padding alone is the negative prompt
  nothing = run.text_encoder.embed(np.zeros_like(batch["tokens"][:1]))
  np.testing.assert_array_equal(run.negative, nothing)


def test_data_are_made_once(with_data):
  before = tiny_run.files(with_data.workdir)
  stages.prepare_data(with_data)
  assert tiny_run.files(with_data.workdir) == before
  assert len(tfds_builder.open_source(with_data.directory("data"))) == 16


def test_as_many_clips_are_fitted_on_as_memory_is_given(with_data, monkeypatch):
  clip = 4 * 16 * 16 * 3  # bytes
  for given, count in ((1 << 30, 16), (3 * clip + 5, 3), (1, 1)):
    monkeypatch.setattr(prepared_data, "BYTES", given)
    assert len(prepared_data.videos_to_fit(with_data)) == count


def test_processes_read_their_own_rows_of_the_same_batches(with_data, monkeypatch):
  """As two hosts would: together the rows of one, each example with its index in the whole
  batch.
  """
  whole = with_data.clips("data", 8, ("video",), salt=1)
  expected = [next(whole) for _ in range(3)]
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  for process in range(2):
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    iterators = loop.DataIterators(with_data, clips=with_data.clips("data", 8, ("video",), salt=1))
    monkeypatch.setattr(loop, "put_batch", lambda batch, mesh: batch)
    rows = slice(4 * process, 4 * process + 4)
    for batch in expected:
      found = iterators.next("clips")
      # its rows alone: other numbers of rows may be rounded otherwise
      latents = with_data.autoencoder.encode(batch["video"][rows])
      np.testing.assert_array_equal(found["latents"], latents)
      text = with_data.text_encoder.embed(batch["tokens"][rows])
      np.testing.assert_array_equal(found["text"], text)
      np.testing.assert_array_equal(found["example_id"], np.arange(8)[rows])
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  with pytest.raises(UserError, match="a batch of 8 cannot be split over 3 processes"):
    with_data.clips("data", 8, ("video",), salt=1)


def test_held_out_prompts_are_as_many_as_asked_for(with_data):
  assert with_data.held_out(0) == []
  assert len(set(with_data.held_out(9))) == 9
  many = with_data.held_out(60)
  assert len(many) == 60 and set(many) == set(with_data.held_out(27))


# ------------------------------------------------------------------------------------- sample stage


@pytest.mark.parametrize("frames, rounded", [(1, 2), (2, 2), (3, 4), (16, 16)])
def test_frames_are_rounded_up_to_blocks(with_data, capfd, frames, rounded):
  assert samples.round_to_blocks(with_data, frames) == rounded
  said = (
    f"frames = {frames} is not whole blocks of 2 frames: making {rounded}\n"
    if frames != rounded
    else ""
  )
  assert capfd.readouterr().err == said


def test_strict_frames_name_both_neighbours(with_data):
  with pytest.raises(
    UserError, match="frames = 7 is not whole blocks of 2 frames; the nearest counts are 6 and 8$"
  ):
    samples.round_to_blocks(with_data, 7, strict=True)
  with pytest.raises(UserError, match="the nearest count is 2$"):
    samples.round_to_blocks(with_data, 1, strict=True)
  with pytest.raises(UserError, match="frames = 0: expected at least 1"):
    samples.round_to_blocks(with_data, 0)


def test_the_length_of_a_sample_is_in_training_lengths(tmp_path):
  assert samples.long_frames(make_run(tmp_path / "a", sample__length=4.0)) == 16
  # 4.4 frames: three blocks
  assert samples.long_frames(make_run(tmp_path / "b", sample__length=1.1)) == 6


def test_prompts_of_a_file_are_taken_once(tmp_path):
  (tmp_path / "p.txt").write_text("a red circle\n# a comment\n\na blue square\na red circle\n")
  run = make_run(tmp_path / "w", sample__prompts=str(tmp_path / "p.txt"), sample__measure=5)
  prompts = samples.read_prompts(run)
  assert prompts == ["a red circle", "a blue square"]
  assert (
    len(samples.measured_prompts(run, prompts)) == 5
    and samples.measured_prompts(run, prompts)[:2] == prompts
  )


def test_words_that_do_nothing_are_said(with_data, capfd):
  samples.print_warnings(with_data, "a red circle moving left")
  assert capfd.readouterr().err == ""
  samples.print_warnings(with_data, "a purple circle, dancing")
  assert capfd.readouterr().err == (
    "prompt 'a purple circle, dancing': the model does not know 'purple', 'dancing'; it is made "
    "without\n"
  )
  samples.print_warnings(with_data, "a red circle " * 10)
  assert "the model reads 12 words; the last 18 are left out" in capfd.readouterr().err


def test_captions_that_are_cut_are_counted_once(tmp_path, capfd):
  """By the data stage that makes the data, for all of them in one line."""
  run = make_run(tmp_path, text__length=3)
  for expected in (1, 0):
    stages.prepare_data(run)
    lines = [x for x in capfd.readouterr().err.splitlines() if "not read whole" in x]
    assert len(lines) == expected
    for line in lines:
      assert line.startswith(
        "data: 16 of 16 captions are not read whole (--config.text.length is 3)"
      )
      assert "the model reads 3 words; the last " in line


def test_file_names_are_short_unique_and_safe():
  taken = set()
  names = [
    samples.file_name(prompt, taken)
    for prompt in ("A red circle!", "a red circle", "../../etc/passwd", "", "x " * 99)
  ]
  assert names[:4] == ["a-red-circle.mp4", "a-red-circle-2.mp4", "etc-passwd.mp4", "prompt.mp4"]
  assert len(names[4]) <= 84 and all(pathlib.PurePath(name).name == name for name in names)


@pytest.mark.parametrize(("batch", "devices"), [(8, 8), (6, 1)])
def test_the_rows_of_a_walk_are_shared_by_the_devices(with_data, monkeypatch, batch, devices):
  """Each walks its own; where they do not divide the rows, all walk all."""
  trajectories = dataclasses.replace(with_data.experiment.trajectories, batch=batch, count=batch)
  e = dataclasses.replace(with_data.experiment, trajectories=trajectories)
  run, seen = dataclasses.replace(with_data, experiment=e), []

  def walk(params, text, rows, before):
    for x in (text, rows, before):
      seen.append({shard.data.shape[0] for shard in x.addressable_shards})
    return np.zeros((batch, 1))

  class Parts:
    missing_parts = staticmethod(lambda index, count: [0])
    rows = staticmethod(lambda part: range(batch))
    write_part = staticmethod(lambda *part: None)

  monkeypatch.setattr(stages.pretrained, "load_teacher", lambda run: None)
  monkeypatch.setattr(Run, "teacher_sampler", lambda run, key: walk)
  stages._write_parts(run, Parts())
  assert seen == [{batch // devices}] * 3
