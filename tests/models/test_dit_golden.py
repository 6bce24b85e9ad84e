"""Every recording of the published DiT, its rollouts and its losses, reproduced.

A case is a folder; each of its files, and each array in a file, must be known here. Nothing is
assumed of sizes: they come from config.json, the arrays and the names.
"""

import dataclasses
import functools
import itertools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax import flow
from hiar_jax.conversion.dit_keys import dit_key_map
from hiar_jax.errors import UserError
from hiar_jax.losses import critic, dmd, forward_kl
from hiar_jax.models import dit
from hiar_jax.models.frames import Bound, Frames, Read, bind
from hiar_jax.rollout import exit_step, sample
from hiar_jax.rollout.past.clip_groups import block_groups, causal_groups
from tests.helpers import golden_cases
from tests.helpers.compiling import quick_jit
from tests.helpers.golden_cases import Case, assert_close, channels_last, noise_table
from tests.helpers.published_params import to_published
from tests.helpers.slow_cases import few

# what marks a folder as a recorded DiT, VAE, text encoder or packed history
KINDS = {golden_cases.DIT, "vae.npz", "umt5.npz", "framepack.json"}
CASES = golden_cases.cases()
FILES = [  # config.json is read for each of them
  (case, path.name)
  for case in CASES
  for path in sorted(case.path.iterdir())
  if path.name != "config.json"
]
# what compiles for long, where the other folder's recording of its kind stays
LONG = {
  ("dit_framewise", "training_rollout_exit1.npz"),
  ("dit_framewise", "training_rollout_exit2.npz"),
  ("dit_framewise", "training_rollout_exit0.npz"),
  ("dit_small", "dmd.npz"),
  ("dit_framewise", "forward_kl.npz"),
  ("dit_framewise", "continuation_block_first.npz"),
  ("dit_small", "continuation_step_first.npz"),
  ("dit_framewise", "rollout_block_first.npz"),
  ("dit_framewise", "rollout_block_first_window3_sink1.npz"),
  ("dit_small", "rollout_block_first.npz"),
  ("dit_small", "rollout_step_first_ode.npz"),
  ("dit_small", "rollout_step_first.npz"),
  ("dit_framewise", "rollout_step_first_clean_context.npz"),
  ("dit_framewise", "rollout_step_first_window3_sink1.npz"),
  ("dit_framewise", "training_rollout_exit3.npz"),
  # streamed in tests/rollout
  ("dit_framewise", "continuation_step_first.npz"),
  ("dit_framewise", "rollout_step_first.npz"),
  ("dit_small", "rollout_step_first_window6_sink0.npz"),
  ("dit_small", "rollout_step_first_clean_context.npz"),
}
QUICK = [(case, file) for case, file in FILES if (case.path.name, file) not in LONG]
GUIDANCE = 3.0  # of the published distribution matching
CLAMP = (20, 980)  # of its timesteps
TARGETS = {"pred_x0": "x0", "gt_x0": "end"}


def _arrays(named: dict, prefix: str) -> dict:
  """Takes the arrays under `prefix` out of a recording."""
  return {
    name.removeprefix(prefix): named.pop(name)
    for name in [name for name in named if name.startswith(prefix)]
  }


def _assert_gradients(case: Case, gradients, recorded: dict) -> None:
  """Gradients of our parameters against those recorded under published names."""
  assert recorded
  ours = to_published(gradients, dit_key_map(case.config), "DiT")
  for name, expected in recorded.items():
    assert_close(ours[name], expected, f"gradient of {name}")


# -- weights and schedules


def weights(case: Case, z: dict, network: str) -> None:
  params = case.params(network)
  like = jax.eval_shape(lambda: case.config.init(jax.random.key(0)))
  assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(
    lambda leaf: leaf.shape, like
  )
  for name, back in to_published(params, dit_key_map(case.config), "DiT").items():
    expected = z.pop(name)
    assert back.dtype == expected.dtype and back.tobytes() == expected.tobytes(), name


def schedule(case: Case, z: dict) -> None:
  del case
  for name in list(z):
    if match := re.fullmatch(r"sigmas_(\d+)_shift([\d.]+)", name):
      assert_close(flow.sigma_schedule(int(match[1]), float(match[2]))[:-1], z.pop(name), name)
    elif match := re.fullmatch(r"warped_([\d_]+)_shift([\d.]+)", name):
      nominal = tuple(float(part) for part in match[1].split("_"))
      assert_close(
        flow.timestep(flow.shifted_schedule(nominal, float(match[2])))[:-1], z.pop(name), name
      )


# -- forward passes


def _velocity(case: Case, network: str, text, groups) -> jax.Array:
  """The groups' velocity, joined [b f h w c]."""
  run = quick_jit(lambda bound, groups: jnp.concatenate(bound(groups).velocity, axis=1))
  return run(bind(case.config, case.params(network), text), groups)


def _assert_forward(z: dict, velocity) -> None:
  assert_close(velocity, channels_last(z.pop("flow")), "velocity")
  x = channels_last(z.pop("x"))
  assert_close(flow.x0_from_velocity(x, velocity, z.pop("sigma")), channels_last(z.pop("x0")), "x0")


def forward(case: Case, z: dict, kind: str) -> None:
  x, level = channels_last(z["x"]), z.pop("timestep") / 1000
  if kind == "block_causal":
    network, groups = "generator", causal_groups(x, level, case.history())
  else:
    network, groups = "fake_score", (Frames(x, level, jnp.arange(x.shape[1])),)
  _assert_forward(z, _velocity(case, network, z.pop("prompt_embeds"), groups))


def teacher_forcing_forward(case: Case, z: dict) -> None:
  """One forward over [context | noisy]: noisy blocks read the groups of the context before them."""
  clean, x, row = channels_last(z.pop("clean_x")), channels_last(z["x"]), case.history()
  contexts = causal_groups(clean, 0.0, row)
  shown = {n: Read(group=n) for n in range(len(contexts))}
  noisy = block_groups(x, z.pop("timestep") / 1000, row, [shown] * len(contexts))
  velocity = _velocity(case, "generator", z.pop("prompt_embeds"), (*contexts, *noisy))
  _assert_forward(z, velocity[:, clean.shape[1] :])


# -- rollouts


def rollout(
  case: Case, z: dict, start: str, order: str, renoise: str, context: str, window: str, sink: str
) -> None:
  """`start`: rollout, or continuation of given frames. The rest names what differs from HiAR."""
  row = case.history(
    order=f"{order}_first",
    level="clean" if context or order == "block" else "output",
    renoise="euler" if renoise else "fresh",
    window=int(window or 0),
    sink=int(sink or 0),
  )
  method = row.at(golden_cases.levels(z.pop("denoising_timesteps")))
  table = noise_table(z.pop("noise"), z.pop("step_noise", None), row.block, method.levels)
  video, text = channels_last(z.pop("latents")), z.pop("prompt_embeds")
  given = channels_last(z.pop("initial_latent")) if start == "continuation" else None
  first = 0 if given is None else given.shape[1] // row.block
  new = dataclasses.replace(case.shape(video), frames=table.shape[1] * row.block)

  def run(params, table, given):
    bound = bind(case.config, params, text)
    return sample.rollout(bound, lambda level, n: table[level, n - first], method, new, given)

  assert_close(quick_jit(run)(case.params("generator"), jnp.asarray(table), given), video)


@functools.cache
def _exit_step(case: Case):
  """One program for every exit level: (params, text, table, level, weight) -> gradients, x0."""
  method = case.history().at(case.levels)

  def loss(params, text, table, level, weight):
    bound, noise = bind(case.config, params, text), lambda level, n: table[level, n]
    x0 = exit_step.self_rollout(bound, noise, method, case.shape(weight), level)
    return jnp.sum(x0 * weight), x0

  return quick_jit(jax.grad(loss, has_aux=True))


def training_rollout(case: Case, z: dict, exit_level: str) -> None:
  assert int(z.pop("exit_step")) == int(exit_level) < len(case.levels) - 1
  table = noise_table(
    z.pop("noise"), z.pop("step_noise", None), case.history().block, len(case.levels) - 1
  )
  gradients, x0 = _exit_step(case)(
    case.params("generator"),
    z.pop("prompt_embeds"),
    table,
    int(exit_level),
    channels_last(z.pop("loss_weight")),
  )
  assert_close(x0, channels_last(z.pop("output")), "x0")
  _assert_gradients(case, gradients, _arrays(z, "grad/"))


# -- losses


def _drawn_level(
  case: Case, raw: np.ndarray, shift: float, batch: int
) -> tuple[jax.Array, jax.Array]:
  """(timestep, sigma), each [b]: sigma is looked up at the nearest of the published scheduler's
  1,000 points.
  """
  timestep = np.clip(1000 * flow.shift_sigma(raw.reshape(-1) / 1000, shift), *CLAMP)
  grid = flow.sigma_schedule(1000, case.sizes["shift"])[:-1]
  sigma = grid[np.abs(1000 * grid - timestep[:, None]).argmin(axis=1)]
  return tuple(
    jnp.broadcast_to(jnp.asarray(level, jnp.float32), batch) for level in (timestep, sigma)
  )


@dataclasses.dataclass(frozen=True, eq=False)
class AtTimestep:
  """A network that is called at a timestep [b] of its own, whatever the level of its groups."""

  config: dit.DiTConfig
  timestep: jax.Array

  def apply(self, params, groups, *rest):
    groups = tuple(group.replace(sigma=self.timestep / 1000) for group in groups)
    return self.config.apply(params, groups, *rest)


def dmd_losses(case: Case, z: dict) -> None:
  x, text, negative = (
    channels_last(z.pop("x")),
    z.pop("prompt_embeds"),
    z.pop("negative_prompt_embeds"),
  )
  timestep, sigma = _drawn_level(
    case, z.pop("raw_timestep"), float(z.pop("timestep_shift")), x.shape[0]
  )

  def at_timestep(params, text) -> Bound:
    return bind(AtTimestep(case.config, timestep), params, text)

  def distribution_matching(x, fake, real, eps):
    scores = dmd.Scores(
      fake=at_timestep(fake, text),
      real=at_timestep(real, text),
      negative=at_timestep(real, negative),
    )
    gradient = dmd.dmd_gradient(scores, x, eps, sigma, GUIDANCE)
    return jnp.mean(dmd.dmd(x, gradient))

  def critic_loss(params, eps):
    return jnp.mean(critic.critic(at_timestep(params, text), x, eps, sigma))

  fake, real = case.params("fake_score"), case.params("real_score")
  loss, gradient = quick_jit(jax.value_and_grad(distribution_matching))(
    x, fake, real, channels_last(z.pop("score_noise"))
  )
  assert_close(loss, z.pop("generator_loss"), "distribution-matching loss")
  assert_close(gradient, channels_last(z.pop("grad_x")), "its gradient")
  loss, gradient = quick_jit(jax.value_and_grad(critic_loss))(
    fake, channels_last(z.pop("critic_noise"))
  )
  assert_close(loss, z.pop("critic_loss"), "critic loss")
  _assert_gradients(case, gradient, _arrays(z, "critic_grad/"))


def forward_kl_losses(case: Case, z: dict) -> None:
  text, points = z.pop("prompt_embeds"), jnp.asarray(channels_last(z.pop("trajectory")))
  sigmas = jnp.asarray(golden_cases.levels(z.pop("denoising_timesteps")))
  point_sigmas = jnp.asarray(z.pop("teacher_sigmas"), jnp.float32)

  def loss(params, step, attention, kind):
    terms = forward_kl.forward_kl(
      bind(case.config, params, text),
      points,
      step,
      sigmas,
      case.history(),
      attention=attention,
      target=TARGETS[kind],
      point_sigmas=point_sigmas,
    )
    return jnp.mean(terms)

  def gradient(params, step, attention):
    return quick_jit(jax.grad(lambda params: loss(params, step, attention, "pred_x0")))(params)

  params, kinds = case.params("generator"), list(itertools.product(forward_kl.ATTENTIONS, TARGETS))
  values = quick_jit(lambda params, step: {kind: loss(params, step, *kind) for kind in kinds})
  for name in [
    name for name in z if re.fullmatch(r"(causal|bidirectional)/step\d+/(pred_x0|gt_x0)", name)
  ]:
    attention, step, kind = name.split("/")
    assert_close(values(params, int(step.removeprefix("step")))[attention, kind], z.pop(name), name)
  for attention, step in sorted(
    {match.groups() for name in z if (match := re.match(GRADIENT, name))}
  ):
    gradients = gradient(params, int(step), attention)
    _assert_gradients(case, gradients, _arrays(z, f"{attention}_grad_step{step}/"))


GRADIENT = r"(causal|bidirectional)_grad_step(\d+)/"
ROW = r"(?:(_ode)|(_clean_context))?(?:_window(\d+)_sink(\d+))?"
KNOWN = {
  r"weights_(generator|fake_score|real_score)\.npz": weights,
  r"schedule\.npz": schedule,
  r"(bidirectional|block_causal)_forward\.npz": forward,
  r"teacher_forcing_forward\.npz": teacher_forcing_forward,
  rf"(rollout|continuation)_(step|block)_first{ROW}\.npz": rollout,
  r"training_rollout_exit(\d+)\.npz": training_rollout,
  r"dmd\.npz": dmd_losses,
  r"forward_kl\.npz": forward_kl_losses,
}


def check(case: Case, file: str) -> None:
  """Reproduces one file; fails where the file or one of its arrays is unknown."""
  matches = [
    (reproduce, match)
    for pattern, reproduce in KNOWN.items()
    if (match := re.fullmatch(pattern, file))
  ]
  assert matches, f"{case.path / file}: no test knows this file"
  (reproduce, match), arrays = matches[0], case.load(file)
  reproduce(case, arrays, *match.groups())
  assert not arrays, f"{case.path / file}: no test knows {sorted(arrays)}"


def test_recordings_are_found():
  """An empty or missing directory is not a pass, and no folder in it is overlooked."""
  found = sorted(path for path in golden_cases.ROOT.glob("*") if path.is_dir())
  assert found, f"{golden_cases.ROOT} holds no recordings"
  unknown = [path.name for path in found if not any((path / marker).exists() for marker in KINDS)]
  assert not unknown, f"no test knows what is recorded in {unknown}"


@pytest.mark.parametrize(
  ("case", "file"),
  few(FILES, *QUICK),
  ids=lambda part: part.path.name if isinstance(part, Case) else part,
)
def test_recording(case, file):
  check(case, file)


# -- the checks themselves can fail


@pytest.fixture
def copy(tmp_path):
  """A small folder of recordings to spoil."""
  if not CASES:
    pytest.skip("no recorded DiT to copy")
  target = Case(tmp_path / "copy")
  target.path.mkdir()
  for name in ("config.json", "schedule.npz", golden_cases.DIT):
    shutil.copy(CASES[0].path / name, target.path / name)
  return target


def test_an_unknown_file_fails(copy):
  shutil.copy(copy.path / "schedule.npz", copy.path / "rollout_sideways.npz")
  with pytest.raises(AssertionError, match="no test knows this file"):
    check(copy, "rollout_sideways.npz")


def test_an_unknown_array_fails(copy):
  np.savez(copy.path / "schedule.npz", **copy.load("schedule.npz"), bogus=np.zeros(3))
  with pytest.raises(AssertionError, match="no test knows.*bogus"):
    check(copy, "schedule.npz")


def test_a_changed_array_fails(copy):
  arrays = copy.load("schedule.npz")
  name = next(name for name in arrays if name.startswith("sigmas"))
  np.savez(copy.path / "schedule.npz", **{**arrays, name: arrays[name] * 1.001})
  with pytest.raises(AssertionError, match="off by"):
    check(copy, "schedule.npz")


def test_unknown_weights_fail(copy):
  np.savez(
    copy.path / "weights_generator.npz", **copy.load("weights_generator.npz"), bogus=np.zeros(3)
  )
  with pytest.raises(UserError, match="bogus"):
    check(copy, "weights_generator.npz")


@pytest.mark.parametrize("make", [False, True], ids=["missing", "empty"])
def test_no_recordings_fail(monkeypatch, tmp_path, make):
  root = tmp_path / "golden"
  if make:
    root.mkdir()
  monkeypatch.setattr(golden_cases, "ROOT", root)
  with pytest.raises(AssertionError, match="holds no recordings"):
    test_recordings_are_found()
