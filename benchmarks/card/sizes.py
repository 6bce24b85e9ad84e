"""The sizes of a run on a card: Wan2.1's, and small ones for a rehearsal."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sizes:
  """frames, height, width: of a clip's latents; block: latent frames generated at once.

  student, teacher: fields of DiTConfig. text: (tokens, width) of a prompt. vae, taehv: fields of
  their configs. repeats: timed runs of a program. kernel: of attention, where one is taken for
  granted.
  """

  frames: int
  height: int
  width: int
  block: int
  student: dict
  teacher: dict
  text: tuple[int, int]
  vae: dict
  taehv: dict
  repeats: int
  kernel: str

  @property
  def tokens(self) -> int:
    """Tokens of a latent frame, of 2 x 2 latents each."""
    return self.height * self.width // 4


SIZES = {
  # Wan2.1 at 480x832, 81 frames; the 14B as the teacher
  "wan": Sizes(
    frames=21,
    height=60,
    width=104,
    block=3,
    student=dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    teacher=dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    text=(512, 4096),
    vae={},
    taehv={},
    repeats=5,
    kernel="cudnn",
  ),
  "small": Sizes(
    frames=12,  # SAF's window
    height=4,
    width=6,
    block=3,
    student=dict(dim=32, ffn_dim=64, num_heads=2, num_layers=2),
    teacher=dict(dim=48, ffn_dim=64, num_heads=3, num_layers=2),
    text=(8, 16),
    vae=dict(dim=8),
    taehv=dict(encoder_width=8, decoder_widths=(16, 8, 8, 8)),
    repeats=1,
    kernel="xla",
  ),
}
