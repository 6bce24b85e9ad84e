"""A generation without a network: latents that say which block and prompt they are of, as fast or
as slow as a test wants.
"""

import dataclasses
import json
import pathlib
import threading
import time

import numpy as np

SIZE = 16  # of the frames, in pixels


@dataclasses.dataclass(frozen=True)
class Emitted:
  block: int
  latents: np.ndarray


class FakeGeneration:
  """Interface of streaming.live_video.LiveVideo.

  seconds: what a tick takes; fail_at: the block at which it breaks.
  """

  decoder = None
  engine = None

  def __init__(
    self, prompt="a red circle", seed=0, *, levels=4, block=3, seconds=0.0, fail_at=None
  ):
    self.prompt, self.seed, self.levels, self.block, self.seconds, self.fail_at = (
      prompt,
      seed,
      levels,
      block,
      seconds,
      fail_at,
    )
    self.next_block, self._prompts = 0, {}
    self.changes, self.threads, self.saved = [], set(), []

  def step(self):
    time.sleep(self.seconds)
    self.threads.add(threading.current_thread().name)
    self._prompts[self.next_block] = self.prompt
    self.next_block += 1
    out = self.next_block - self.levels
    if out == self.fail_at is not None:
      raise FloatingPointError(f"block {out} is not finite")
    if out < 0:
      return None
    return Emitted(out, latents_of(out, self._prompts.pop(out), self.seed, self.block))

  @property
  def in_flight(self):
    blocks = ((level, self.next_block - level) for level in range(1, self.levels))
    return [
      (level, block, self._prompts[block]) for level, block in blocks if block in self._prompts
    ]

  def change_prompt(self, prompt, recache=False):
    self.prompt = prompt
    self.changes.append((self.next_block, prompt, recache))
    return self.next_block

  def save(self, directory):
    path = pathlib.Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    kept = {
      "prompt": self.prompt,
      "seed": self.seed,
      "next": self.next_block,
      "prompts": self._prompts,
    }
    (path / "facts.json").write_text(json.dumps(kept))
    np.savez(path / "decoder.npz", *map(np.asarray, self.decoder or []))

  @classmethod
  def restore(cls, directory, **options):
    path = pathlib.Path(directory)
    facts = json.loads((path / "facts.json").read_text())
    self = cls(facts["prompt"], facts["seed"], **options)
    self.next_block, self._prompts = (
      facts["next"],
      {int(block): prompt for block, prompt in facts["prompts"].items()},
    )
    with np.load(path / "decoder.npz") as stored:
      self.decoder = [stored[name] for name in stored.files] or None
    return self


def latents_of(block, prompt, seed=0, frames=3):
  """[1 f 1 1 2]: the block, and what the prompt and the seed add up to."""
  return np.broadcast_to(
    np.asarray([block, sum(prompt.encode()) + seed], np.float32), (1, frames, 1, 1, 2)
  )


class FakeDecoder:
  """A frame of a moving bar in a colour of the prompt for each latent frame; its memory is the sum
  of all blocks so far, and shows too.
  """

  def __init__(self, seconds=0.0, fail_at=None):
    self.seconds, self.fail_at, self.threads = seconds, fail_at, set()

  def __call__(self, latents, memory):
    time.sleep(self.seconds)
    self.threads.add(threading.current_thread().name)
    block, prompt = (int(number) for number in latents[0, 0, 0, 0])
    if block == self.fail_at:
      raise ValueError(f"block {block} cannot be decoded")
    memory = np.zeros(1, np.int32) if memory is None else memory
    frames = np.full((latents.shape[1], SIZE, SIZE, 3), 30, np.uint8)
    for i, frame in enumerate(frames):
      frame[:, (block * latents.shape[1] + i) % SIZE] = (
        prompt * 37 % 200 + 55,
        prompt * 91 % 200 + 55,
        prompt * 13 % 200 + 55,
      )
      frame[0, 0] = memory[0] % 256
    return frames, memory + block

  def remember(self, leaves, latents):
    return np.asarray(leaves[0], np.int32) if leaves else None


PROMPTS = ["a red circle", "a blue square", "a green star"]


def expected(prompts, seed=0):
  """Frames of blocks with these prompts, decoded one after another."""
  decoder, memory, chunks = FakeDecoder(), None, []
  for block, prompt in enumerate(prompts):
    frames, memory = decoder(latents_of(block, prompt, seed), memory)
    chunks.append(frames)
  return np.concatenate(chunks)
