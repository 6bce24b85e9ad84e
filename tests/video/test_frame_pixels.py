"""Decoded frames have the colours of the standards' formulas, whatever their format and size."""

from fractions import Fraction
import struct

import av
import numpy as np
from PIL import Image
import pytest

from hiar_jax.video import conditioning_files, frame_pixels, mp4, video_file
from tests.helpers.video_reader import clips

# ITU-T H.273: the weights of red and blue in luma, by the number of the matrix
MATRICES = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}  # BT.709, 601, 2020


def planes_of(rgb, matrix, levels=1):
  """Luma and both chromas of limited range, floats; levels: 1 for 8 bits, 4 for 10."""
  red, blue = MATRICES[matrix]
  rgb = np.asarray(rgb, float) / 255
  y = rgb @ [red, 1 - red - blue, blue]
  u, v = (rgb[..., 2] - y) / (2 - 2 * blue), (rgb[..., 0] - y) / (2 - 2 * red)
  return (219 * y + 16) * levels, (224 * u + 128) * levels, (224 * v + 128) * levels


def rgb_of(planes, matrix, levels=1):
  """The inverse of `planes_of`."""
  red, blue = MATRICES[matrix]
  y, u, v = (np.asarray(plane, float) / levels for plane in planes)
  y, u, v = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
  r, b = y + (2 - 2 * red) * v, y + (2 - 2 * blue) * u
  return 255 * np.stack([r, (y - red * r - blue * b) / (1 - red - blue), b], -1)


def flat_frame(values, form, matrix, height=32, width=32):
  """A frame of one Y, U, V."""
  frame = av.VideoFrame(width, height, form)
  for plane, value in zip(frame.planes, values, strict=True):
    kind = np.uint16 if "10" in form else np.uint8
    plane.update(np.full(plane.buffer_size // kind().itemsize, value, kind).tobytes())
  frame.colorspace, frame.color_range = matrix, 1
  return frame


@pytest.mark.parametrize("size", [32, 20, 50])
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("form", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le"])
def test_colours_are_exact(form, matrix, size):
  """At the stored size, below and above it: each colour within rounding, and none darker."""
  levels = 4 if "10" in form else 1
  errors = []
  for colour in np.random.default_rng([matrix, size]).integers(20, 236, (40, 3)):
    values = np.rint(planes_of(colour, matrix, levels)).astype(int)
    found = frame_pixels.Look().cover(flat_frame(values, form, matrix), size, size)
    assert (found == found[0, 0]).all()
    errors.append(found[0, 0] - np.clip(rgb_of(values, matrix, levels), 0, 255))
  assert np.abs(errors).max() <= 0.52  # swscale's coefficients have 14 bits
  assert np.abs(np.mean(errors, 0)).max() <= 0.1


def write(path, codec, form, picture, options=None, aspect=None, **colours):
  """Nine frames of a picture uint8 [H W 3 or 4]."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=8, options=options or {})
    stream.height, stream.width = picture.shape[:2]
    stream.pix_fmt = form
    if aspect:
      stream.sample_aspect_ratio = aspect
    for name, value in colours.items():
      setattr(stream.codec_context, name, value)
    for _ in range(9):
      kind = "rgba" if picture.shape[2] == 4 else "rgb24"
      frame = av.VideoFrame.from_ndarray(picture, format=kind)
      container.mux(stream.encode(frame.reformat(format=form)))
    container.mux(stream.encode())
  return path


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2)])
def test_pixels_are_made_square(tmp_path, suffix, aspect):
  """A circle that is stored squeezed is round, in training and as a start."""
  wide, high = (1, 2) if aspect > 1 else (2, 1)
  y, x = np.mgrid[: 48 * high, : 48 * wide] + 0.5
  inside = ((x / wide - 24) ** 2 + (y / high - 24) ** 2 < 20**2)[..., None]
  picture = np.where(inside, 220, 20).repeat(3, -1).astype(np.uint8)
  path = write(tmp_path / f"a.{suffix}", "libx264", "yuv420p", picture, {"crf": "8"}, aspect)
  frames, said = conditioning_files.read_video(path, 96, 96, 8)
  found = frames[4, ..., 0] > 120
  assert abs(found.any(0).sum() - 80) <= 3 and abs(found.any(1).sum() - 80) <= 3
  side = 48 * max(wide * aspect, high)
  ratio = f"{aspect.numerator}:{aspect.denominator}"
  assert said.startswith(f"a.{suffix}: {side}x{side}, its pixels of {ratio} made square")
  clip = next(clips(path, video_file.Sampling(5, 96, 96, 8, 5)))
  np.testing.assert_array_equal(clip[4], frames[4])


def quarters():
  """A grey picture with a red, a green and a blue corner."""
  picture = np.full((48, 64, 3), 128, np.uint8)
  picture[:16, :16], picture[:16, -16:], picture[-16:, :16] = (200, 0, 0), (0, 200, 0), (0, 0, 200)
  return picture


# The eight display matrices of right angles, and what they make of a picture.
TURNS = {
  (1, 0, 0, 1): lambda image: image,
  (-1, 0, 0, 1): np.fliplr,
  (1, 0, 0, -1): np.flipud,
  (-1, 0, 0, -1): lambda image: np.rot90(image, 2),
  (0, 1, -1, 0): lambda image: np.rot90(image, -1),
  (0, -1, 1, 0): np.rot90,
  (0, 1, 1, 0): lambda image: image.transpose(1, 0, 2),
  (0, -1, -1, 0): lambda image: np.rot90(image, 2).transpose(1, 0, 2),
}


@pytest.mark.parametrize("matrix", TURNS, ids=str)
def test_display_matrices(tmp_path, matrix):
  """Turned and mirrored pictures: the track header says where (x, y) is shown, y downwards."""
  path = write(tmp_path / "a.mp4", "libx264", "yuv444p", quarters(), {"crf": "8"})
  content = bytearray(path.read_bytes())
  place = content.index(b"tkhd") + 44  # ISO/IEC 14496-12, 8.3.2, version 0
  assert struct.unpack_from(">9i", content, place)[::4] == (1 << 16, 1 << 16, 1 << 30)
  a, b, c, d = (number << 16 for number in matrix)
  struct.pack_into(">9i", content, place, a, b, 0, c, d, 0, 0, 0, 1 << 30)
  path.write_bytes(content)
  wanted = TURNS[matrix](quarters()).astype(int)
  frames, said = conditioning_files.read_video(path, *wanted.shape[:2], 8)
  assert np.abs(frames[4] - wanted).mean() < 3
  a, b, c, d = matrix
  how = "mirrored" if a * d - b * c < 0 else "turned upright" if a != 1 else ""
  assert (
    said
    == (f"a.mp4: {wanted.shape[0]}x{wanted.shape[1]}, {how} by its container's note")[
      : None if how else 0
    ]
  )


@pytest.mark.parametrize(
  "name, codec, form, options",
  [
    ("a.mov", "qtrle", "argb", {}),
    ("a.mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
    ("a.webm", "libvpx-vp9", "yuva420p", {"auto-alt-ref": "0", "crf": "4", "b": "4M"}),
    ("a.webm", "libvpx", "yuva420p", {"auto-alt-ref": "0", "crf": "4", "b": "4M"}),
  ],
)
def test_transparency_is_black(tmp_path, name, codec, form, options):
  """What is hidden is not shown, what is half hidden is half as bright."""
  picture = np.full((48, 64, 4), (200, 100, 60, 255), np.uint8)
  picture[:, 20:40, 3], picture[:, 40:, 3] = 128, 0
  path = write(tmp_path / name, codec, form, picture, options)
  frames, said = conditioning_files.read_video(path, 48, 64, 8)
  assert said == f"{name}: 48x64, transparency shown on black" and len(frames) == 9
  found = frames[4, 24, [10, 30, 54]].astype(int)
  np.testing.assert_allclose(found, [(200, 100, 60), (100, 50, 30), (0, 0, 0)], atol=5)
  opaque = np.full((48, 64, 4), (200, 100, 60, 255), np.uint8)
  frames, said = conditioning_files.read_video(
    write(tmp_path / f"opaque_{name}", codec, form, opaque, options), 48, 64, 8
  )
  assert said == ""


@pytest.mark.parametrize("hidden", [False, True])
def test_transparency_of_gifs_is_black(tmp_path, hidden):
  """As a film and as a picture."""
  pictures = [np.full((48, 64, 4), (200, 100, shade, 255), np.uint8) for shade in (60, 90)]
  for picture in pictures:
    picture[:, 40:, 3] = 0 if hidden else 255
  first, *later = map(Image.fromarray, pictures)
  path = tmp_path / "a.gif"
  first.save(path, save_all=True, append_images=later, duration=500, disposal=2)
  film, said = conditioning_files.read_video(path, 48, 64, 8)
  picture, said_of_picture = conditioning_files.read_image(path, 48, 64)
  assert len(film) == 8
  for line in (said, said_of_picture):
    assert ("transparency shown on black" in line) == hidden, line
  for frame in (film[0], film[7], picture[0]):
    shown = (0, 0, 0) if hidden else frame[24, 10]
    assert frame[24, 10, 0] > 180 and frame[24, 54].tolist() == [*shown]


@pytest.mark.parametrize(
  "name, codec, options",
  [
    ("a.mpg", "mpeg2video", {"flags": "+ildct+ilme", "q": "2", "b": "8M"}),
    ("a.mp4", "libx264", {"flags": "+ildct", "x264-params": "tff=1", "crf": "8"}),
  ],
)
def test_interlaced_film_is_deinterlaced(tmp_path, name, codec, options):
  """A bar that moves between the two fields of a frame: no line differs from its neighbours."""
  path = tmp_path / name
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=25, options=options)
    stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
    for i in range(16):
      picture = np.full((96, 128, 3), (160, 60, 60), np.uint8)
      for field in (0, 1):
        left = 6 * i + 3 * field
        picture[field::2, left : left + 16] = (60, 107, 200)
      frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  frames, said = conditioning_files.read_video(path, 96, 128, 25)
  assert said == f"{name}: 96x128, deinterlaced" and len(frames) == 16
  lines = frames[8, 20:76].astype(int)
  combing = np.abs(lines[1:-1] * 2 - lines[:-2] - lines[2:]).mean()
  assert combing < 4
  moves, changes = video_file.survey(path, video_file.Sampling(5, 96, 128, 25, 5))
  assert (len(moves), changes) == (16, ["deinterlaced"])
  assert np.abs(frames[8, 48, 120].astype(int) - (160, 60, 60)).max() <= 4


# Light of BT.709's primaries in those of BT.2020 (ITU-R BT.2087) and of Display P3.
WIDE = {
  9: np.asarray([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]),
  12: np.asarray([[0.8225, 0.1774, 0.0], [0.0332, 0.9669, 0.0], [0.0171, 0.0724, 0.9108]]),
}


def hdr_signal(rgb, transfer, primaries, white):
  """An SDR colour of BT.709, shown with its white at `white` cd/m2, as PQ (16), HLG (18) or SDR."""
  light = WIDE[primaries] @ (np.asarray(rgb) / 255) ** 2.4
  if transfer == 16:  # SMPTE ST 2084
    power = (light * white / 1e4) ** (2610 / 16384)
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
  if transfer == 18:  # ARIB STD-B67 on a display of 1000 cd/m2, with a system gamma of 1.2
    light = light * white / 1000
    luminance = light @ [0.2627, 0.6780, 0.0593]
    scene = light * luminance ** (1 / 1.2 - 1)
    return np.where(
      scene <= 1 / 12,
      np.sqrt(3 * scene),
      0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073,
    )
  return light ** (1 / 2.4)


COLOURS = [(255, 255, 255), (128, 128, 128), (20, 20, 20), (200, 60, 40), (40, 160, 200)]


@pytest.mark.parametrize(
  "transfer, primaries, name",
  [
    (16, 9, "HDR (PQ)"),
    (18, 9, "HDR (HLG)"),
    (1, 9, "BT.2020"),
    (14, 9, "BT.2020"),
    (1, 12, "Display P3"),
    (2, 12, "Display P3"),
  ],
)
@pytest.mark.parametrize("size", [32, 20])
def test_hdr_and_wide_gamut_are_made_bt709(transfer, primaries, name, size):
  """White at 203 cd/m2 is white, and every colour that BT.709 has is that colour."""
  for rgb in COLOURS:
    signal = 255 * hdr_signal(rgb, transfer, primaries, 203)
    frame = flat_frame(np.rint(planes_of(signal, 9, 4)).astype(int), "yuv420p10le", 9)
    frame.color_trc, frame.color_primaries = transfer, primaries
    look = frame_pixels.Look()
    found = look.cover(frame, size, size)[3, 3].astype(int)
    assert np.abs(found - rgb).max() <= 4 and np.abs(found - rgb).mean() <= 2.5, (rgb, found)
    assert look.changes == [f"made BT.709 from {name}"]


@pytest.mark.parametrize("transfer", [16, 18])
def test_highlights_are_white(transfer):
  signal = 255 * hdr_signal((255, 255, 255), transfer, 9, 900)
  frame = flat_frame(np.rint(planes_of(signal, 9, 4)).astype(int), "yuv420p10le", 9)
  frame.color_trc, frame.color_primaries = transfer, 9
  assert (frame_pixels.Look().cover(frame, 32, 32) >= 254).all()


@pytest.mark.parametrize("transfer, name", [(16, "PQ"), (18, "HLG")])
def test_an_hdr_file_says_so(tmp_path, transfer, name):
  path = tmp_path / "a.mp4"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=8, options={"crf": "4"})
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p10le"
    context = stream.codec_context
    context.colorspace, context.color_primaries, context.color_trc = 9, 9, transfer
    for _ in range(9):
      signal = 255 * hdr_signal((200, 60, 40), transfer, 9, 203)
      values = np.rint(planes_of(signal, 9, 4)).astype(int)
      container.mux(stream.encode(flat_frame(values, "yuv420p10le", 9, 48, 64)))
    container.mux(stream.encode())
  frames, said = conditioning_files.read_video(path, 48, 64, 8)
  assert said == f"a.mp4: 48x64, made BT.709 from HDR ({name})"
  assert np.abs(frames[4, 9, 9].astype(int) - (200, 60, 40)).max() <= 5


@pytest.mark.parametrize("scale, change", [(1, 2.5), (8, 0.8)])
def test_eight_continuations_keep_the_colours(tmp_path, scale, change):
  """A video that is continued is read and written again each time: it gets neither darker nor
  smeared.
  """
  y, x = np.mgrid[:64, :64]
  waves = np.stack([90 * np.sin(x / 9), 90 * np.cos(y / 7), 80 * np.sin((x + y) / 11)], -1)
  start = np.repeat((128 + waves).astype(np.uint8)[None], 3, 0)
  frames = start
  for k in range(8):
    path = mp4.write_mp4(tmp_path / f"{k}.mp4", frames, 8, scale=scale)
    frames, _ = conditioning_files.read_video(path, 64, 64, 8)
  error = frames.astype(int) - start
  assert np.abs(error.mean((0, 1, 2))).max() <= 1, error.mean((0, 1, 2))
  assert np.abs(error).mean() <= change, np.abs(error).mean()
