"""Which videos can be made: sides, and frames in whole blocks, with what is given before them."""

import pytest

from hiar_jax.components.wan_autoencoder import WanCodecConfig
from hiar_jax.errors import UserError
from hiar_jax.video import lengths

SAME = lambda latent: latent  # a codec that keeps time
WAN = WanCodecConfig().pixel_frames


@pytest.mark.parametrize(
  "frames, latent", [(1, 3), (9, 3), (10, 6), (21, 6), (80, 21), (81, 21), (82, 24), (4089, 1023)]
)
def test_frames_are_rounded_up_to_whole_blocks(frames, latent):
  made, message = lengths.fit_blocks(frames, 3, WAN)
  fits = 1 + 4 * (latent - 1)
  assert made == latent
  assert message == (
    ""
    if fits == frames
    else f"frames = {frames} is not whole blocks of 3 latent frames: making {fits}"
  )


@pytest.mark.parametrize(
  "frames, block, latent, message",
  [
    (8, 2, 8, ""),
    (7, 2, 8, "frames = 7 is not whole blocks of 2 frames: making 8"),
    (1, 3, 3, "frames = 1 is not whole blocks of 3 frames: making 3"),
  ],
)
def test_a_codec_that_keeps_time(frames, block, latent, message):
  assert lengths.fit_blocks(frames, block, SAME) == (latent, message)


@pytest.mark.parametrize(
  "frames, given, new", [(85, 1, 21), (13, 1, 3), (14, 1, 6), (21, 3, 3), (22, 3, 6), (81, 18, 3)]
)
def test_given_frames_count(frames, given, new):
  assert lengths.fit_blocks(frames, 3, WAN, given=given)[0] == new


@pytest.mark.parametrize(
  "frames, given, message",
  [
    (80, 0, "frames = 80 is not whole blocks of 3 latent frames; the nearest counts are 69 and 81"),
    (2, 0, "frames = 2 is not whole blocks of 3 latent frames; the nearest count is 9"),
    (81, 1, "the nearest counts are 73 and 85"),
  ],
)
def test_strict(frames, given, message):
  with pytest.raises(UserError, match=message):
    lengths.fit_blocks(frames, 3, WAN, given=given, strict=True)
  assert lengths.fit_blocks(81, 3, WAN, strict=True) == (21, "")


def test_too_few_frames():
  with pytest.raises(
    UserError,
    match="frames = 0: expected at least 1; .* in blocks of 3 latent frames, they have 9, 21, 33, "
    "...",
  ):
    lengths.fit_blocks(0, 3, WAN)
  with pytest.raises(
    UserError, match="frames = -4: expected at least 1; videos are made in blocks of 2$"
  ):
    lengths.fit_blocks(-4, 2, SAME)
  with pytest.raises(
    UserError, match="frames = 9, but the given start has 9 already; ask for more, from 21 on"
  ):
    lengths.fit_blocks(9, 3, WAN, given=3)


def test_an_absurd_count_takes_no_time():
  assert lengths.fit_blocks(10**12, 3, WAN)[0] * 4 > 10**12


@pytest.mark.parametrize(
  "frames, kept", [(8, (0, 0)), (9, (9, 3)), (20, (9, 3)), (21, (21, 6)), (100, (93, 24))]
)
def test_a_start_is_cropped_to_whole_blocks(frames, kept):
  assert lengths.crop_to_blocks(frames, 3, WAN) == kept


@pytest.mark.parametrize(
  "height, width, message",
  [
    (
      480,
      830,
      "--width=830: the sides of a video are multiples of 16; the nearest size is 480x832",
    ),
    (
      475,
      833,
      "--height=475, --width=833: the sides of a video are multiples of 16; the nearest size is "
      "480x832",
    ),
    (3, 32, "--height=3: .* the nearest size is 16x32"),
    (0, 32, "--height=0"),
    (-16, 32, "--height=-16"),
  ],
)
def test_odd_sides(height, width, message):
  with pytest.raises(UserError, match=message):
    lengths.check_sides(height, width)


def test_good_sides():
  lengths.check_sides(480, 832)
  lengths.check_sides(9, 18, multiple=9)
