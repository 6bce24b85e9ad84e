"""What a video starts from: every size and kind of picture becomes the frames that were asked for,
and it is said how.
"""

from fractions import Fraction

import av
import numpy as np
from PIL import Image
import pytest

from hiar_jax.errors import UserError
from hiar_jax.video import conditioning_files
from hiar_jax.video.mp4 import write_mp4

RED, GREEN, BLUE, WHITE = (220, 30, 30), (30, 180, 60), (30, 60, 220), (255, 255, 255)


def quarters(height, width):
  """Red, green / blue, white."""
  image = np.zeros((height, width, 3), np.uint8)
  image[: height // 2, : width // 2], image[: height // 2, width // 2 :] = RED, GREEN
  image[height // 2 :, : width // 2], image[height // 2 :, width // 2 :] = BLUE, WHITE
  return image


def corners(frame):
  return [tuple(frame[y, x].tolist()) for y in (1, -2) for x in (1, -2)]


def save(path, image, **options):
  (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
  return path


def test_the_right_size_passes_through(tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
  frames, said = conditioning_files.read_image(save(tmp_path / "a.png", image), 16, 32)
  np.testing.assert_array_equal(frames, image[None])
  assert said == ""


@pytest.mark.parametrize(
  "height, width, cropped",
  [
    (480, 800, ""),
    (50, 400, "width"),
    (400, 50, "height"),
    (16, 16, "height"),
    (33, 47, "height"),
    (8, 16, "width"),
    (1, 1, "height"),
  ],
)
def test_any_size_covers_and_keeps_its_middle(tmp_path, height, width, cropped):
  """The middle of the picture stays the middle of the frame, and nothing is squeezed."""
  frames, said = conditioning_files.read_image(
    save(tmp_path / "a.png", quarters(height, width)), 48, 80
  )
  assert frames.shape == (1, 48, 80, 3) and frames.dtype == np.uint8
  assert said.startswith(f"a.png: {height}x{width}, scaled by ") and "to cover 48x80" in said
  assert ("width cropped" in said, "height cropped" in said) == (
    cropped == "width",
    cropped == "height",
  )
  if min(height, width) >= 8:
    assert np.abs(np.subtract(corners(frames[0]), [RED, GREEN, BLUE, WHITE])).max() <= 3


def test_a_circle_stays_round(tmp_path):
  y, x = np.mgrid[:300, :900] + 0.5
  image = (
    np.where((((y - 150) ** 2 + (x - 450) ** 2) < 100**2)[..., None], 255, 0)
    .repeat(3, -1)
    .astype(np.uint8)
  )
  frames, said = conditioning_files.read_image(save(tmp_path / "a.png", image), 96, 96)
  inside = frames[0, ..., 0] > 127
  assert abs(inside.any(0).sum() - 64) <= 1 and abs(inside.any(1).sum() - 64) <= 1
  assert said == "a.png: 300x900, scaled by 0.32 to cover 96x96, 67% of its width cropped"


@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
def test_exif_rotation(tmp_path, orientation):
  """A camera's picture is turned as viewers turn it: Pillow's own transpositions undone here one by
  one.
  """
  # the Image.Transpose that makes upright into stored
  stored = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
  image = Image.fromarray(quarters(32, 64)).transpose(Image.Transpose(stored))
  exif = Image.Exif()
  exif[0x0112] = orientation
  frames, said = conditioning_files.read_image(
    save(tmp_path / "a.jpg", image, exif=exif, quality=95, subsampling=0), 32, 64
  )
  assert np.abs(np.subtract(corners(frames[0]), [RED, GREEN, BLUE, WHITE])).max() < 25
  assert said == "a.jpg: 32x64, turned upright by its EXIF note"


def mode(name):
  rgb = Image.fromarray(quarters(16, 16))
  if name == "I;16":
    return Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
  return rgb.convert(name, palette=Image.Palette.ADAPTIVE)


@pytest.mark.parametrize(
  "name, suffix",
  [
    ("RGB", "png"),
    ("RGB", "webp"),
    ("RGB", "jpg"),
    ("RGB", "bmp"),
    ("RGB", "tiff"),
    ("P", "png"),
    ("P", "gif"),
    ("RGBA", "png"),
    ("RGBA", "webp"),
    ("CMYK", "jpg"),
    ("L", "png"),
    ("LA", "png"),
    ("1", "png"),
    ("I;16", "png"),
    ("I;16", "tiff"),
    ("YCbCr", "jpg"),
  ],
)
def test_modes_and_formats(tmp_path, name, suffix):
  frames, said = conditioning_files.read_image(save(tmp_path / f"a.{suffix}", mode(name)), 16, 16)
  wanted = quarters(16, 16)
  if name in ("L", "LA", "1", "I;16"):
    wanted = np.asarray(Image.fromarray(wanted).convert("1" if name == "1" else "L").convert("RGB"))
  lossy = suffix in ("jpg", "webp") or name == "P"
  assert np.abs(frames[0].astype(int) - wanted).mean() <= (12 if lossy else 0)
  assert said == ("" if name != "I;16" else f"a.{suffix}: 16x16, 16 bits made 8")


def test_transparency_is_black(tmp_path):
  image = np.full((16, 16, 4), 255, np.uint8)
  image[:, :8, 3], image[:, 8:, 3] = 0, 128
  frames, said = conditioning_files.read_image(save(tmp_path / "a.png", image), 16, 16)
  assert frames[0, 3, 3].tolist() == [0, 0, 0] and abs(int(frames[0, 3, 12, 0]) - 128) <= 1
  assert said == "a.png: 16x16, transparency shown on black"


def test_of_an_animation_the_first_frame(tmp_path):
  first, second = (
    Image.fromarray(np.full((16, 16, 3), RED, np.uint8)),
    Image.fromarray(np.full((16, 16, 3), BLUE, np.uint8)),
  )
  frames, said = conditioning_files.read_image(
    save(tmp_path / "a.gif", first, save_all=True, append_images=[second]), 16, 16
  )
  assert (
    np.abs(frames[0, 5, 5].astype(int) - RED).max() < 3
    and said == "a.gif: 16x16, the first of 2 frames"
  )


def bad_image(tmp_path, case):
  path = tmp_path / "start.png"
  if case == "a directory":
    path.mkdir()
  elif case == "text":
    path.write_text("a cat")
  elif case == "empty":
    path.touch()
  elif case == "cut":
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path.write_bytes(save(tmp_path / "whole.png", noise).read_bytes()[:3000])
  elif case == "cut jpeg":
    path.write_bytes(save(tmp_path / "whole.jpg", quarters(64, 64)).read_bytes()[:-300])
  elif case == "head alone":
    path.write_bytes(save(tmp_path / "whole.png", quarters(64, 64)).read_bytes()[:20])
  elif case == "video":
    path.write_bytes(write_mp4(tmp_path / "a.mp4", np.stack([quarters(16, 16)] * 3)).read_bytes())
  elif case == "float":
    path = save(tmp_path / "start.tiff", Image.fromarray(np.ones((16, 16), np.float32)))
  return path


@pytest.mark.parametrize(
  "case, message",
  [
    ("none", "image .*start.png does not exist"),
    ("a directory", "start.png is a directory"),
    ("text", "start.png is not an image"),
    ("empty", "start.png is empty"),
    ("cut", "start.png is a damaged or cut off image"),
    ("cut jpeg", "damaged or cut off"),
    ("head alone", "damaged or cut off"),
    ("video", r"not an image; .* \(a video is given as --video\)"),
    ("float", "whose white is unknown"),
  ],
)
def test_what_is_no_image_is_one_line(tmp_path, case, message):
  with pytest.raises(UserError, match=message) as error:
    conditioning_files.read_image(bad_image(tmp_path, case), 16, 16)
  assert "\n" not in str(error.value)


def test_an_image_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
  path = save(tmp_path / "a.png", quarters(16, 16))
  with pytest.raises(UserError, match="too many pixels"):
    conditioning_files.read_image(path, 16, 16)


# ------------------------------------------------------------------------------------------- videos


def count_up(frames, height=32, width=48):
  """Frame i is grey i * 10."""
  return np.broadcast_to(
    (np.arange(frames, dtype=np.uint8) * 10)[:, None, None, None], (frames, height, width, 3)
  ).copy()


def test_a_video_is_opened_once(tmp_path, monkeypatch):
  """Its size and its rate are those of the frames that are decoded anyway."""
  path = write_mp4(tmp_path / "a.mp4", np.zeros((8, 32, 48, 3), np.uint8), fps=16)
  opened, really = [], av.open
  monkeypatch.setattr(av, "open", lambda *args, **k: opened.append(args[0]) or really(*args, **k))
  frames, said = conditioning_files.read_video(path, 32, 48, 16)
  assert frames.shape == (8, 32, 48, 3) and said == "" and opened == [str(path)]


def test_a_video_of_the_right_size_and_rate(tmp_path):
  path = write_mp4(tmp_path / "a.mp4", count_up(9), 16)
  frames, said = conditioning_files.read_video(path, 32, 48, 16)
  assert frames.shape == (9, 32, 48, 3) and frames.dtype == np.uint8 and said == ""
  assert np.abs(frames[:, 9, 9, 0] - np.arange(9.0) * 10).max() <= 2


def test_the_last_frames_of_a_video(tmp_path):
  frames, said = conditioning_files.read_video(
    write_mp4(tmp_path / "a.mp4", count_up(9), 16), 32, 48, 16, last=4
  )
  assert np.abs(frames[:, 9, 9, 0] - np.arange(5.0, 9) * 10).max() <= 2
  assert said == "a.mp4: 32x48, the last 4 of 9 frames"


@pytest.mark.parametrize(
  "rate, wanted", [(32, [0, 2, 4, 6, 8]), (8, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])]
)
def test_a_video_is_resampled(tmp_path, rate, wanted):
  count = 10 if rate == 32 else 5
  frames, said = conditioning_files.read_video(
    write_mp4(tmp_path / "a.mp4", count_up(count), rate), 32, 48, 16
  )
  assert np.abs(frames[:, 9, 9, 0] - 10.0 * np.asarray(wanted)).max() <= 2
  assert said == f"a.mp4: 32x48, resampled from {rate} to 16 frames a second"


def test_a_video_is_covered_and_cropped(tmp_path):
  path = write_mp4(tmp_path / "a.mp4", np.stack([quarters(64, 256)] * 3), 16)
  frames, said = conditioning_files.read_video(path, 48, 80, 16)
  assert np.abs(np.subtract(corners(frames[1]), [RED, GREEN, BLUE, WHITE])).max() < 25
  assert said == "a.mp4: 64x256, scaled by 0.75 to cover 48x80, 58% of its width cropped"


def test_a_telephone_video_is_upright(tmp_path):
  path = tmp_path / "a.mp4"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=Fraction(16), options={"crf": "10"})
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    for _ in range(3):
      container.mux(stream.encode(av.VideoFrame.from_ndarray(quarters(48, 64), format="rgb24")))
    container.mux(stream.encode())
  matrix = bytes.fromhex("00010000" + "00000000" * 3 + "00010000" + "00000000" * 3 + "40000000")
  # 90 degrees clockwise
  turned = bytes.fromhex(
    "00000000" + "00010000" + "00000000" + "ffff0000" + "00000000" * 4 + "40000000"
  )
  content = path.read_bytes()
  track = content.index(b"tkhd")
  place = content.index(matrix, track)
  path.write_bytes(content[:place] + turned + content[place + len(turned) :])
  frames, said = conditioning_files.read_video(path, 64, 48, 16)
  assert frames.shape == (3, 64, 48, 3)
  assert np.abs(np.subtract(corners(frames[1]), [BLUE, RED, WHITE, GREEN])).max() < 25
  assert said == "a.mp4: 64x48, turned upright by its container's note"


@pytest.mark.parametrize(
  "case, message",
  [
    ("none", "video .*start.mp4 does not exist"),
    ("text", "start.mp4 is not a video"),
    ("empty", "start.mp4 is empty"),
    ("cut", "start.mp4 is not a video, or a damaged one"),
    ("sound", "cannot be used .no video stream"),
    ("short", "is not a video|cannot be used"),
  ],
)
def test_what_is_no_video_is_one_line(tmp_path, case, message):
  path = tmp_path / "start.mp4"
  if case == "text":
    path.write_text("a cat")
  elif case == "empty":
    path.touch()
  elif case in ("cut", "short"):
    whole = write_mp4(
      tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), dtype=np.uint8)
    )
    path.write_bytes(whole.read_bytes()[: {"cut": 3000, "short": 40}[case]])
  elif case == "sound":
    with av.open(str(path), "w") as container:
      stream = container.add_stream("aac", rate=8000)
      frame = av.AudioFrame.from_ndarray(
        np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
      )
      frame.sample_rate = 8000
      container.mux(stream.encode(frame))
      container.mux(stream.encode())
  with pytest.raises(UserError, match=message) as error:
    conditioning_files.read_video(path, 32, 48, 16)
  assert "\n" not in str(error.value)
