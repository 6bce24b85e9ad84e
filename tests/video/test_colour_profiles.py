"""Pictures as cameras and telephones hand them in: colours by their profile, HEIC refused."""

import struct

import numpy as np
from PIL import Image, ImageCms
import pytest

from hiar_jax.errors import UserError
from hiar_jax.video import conditioning_files


def _save(path, image, **options):
  (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
  return path


def matrix_profile(name, primaries, gamma):
  """An ICC profile (version 2) of these primaries (XYZ of red, green, blue) and gamma."""
  number = lambda value: struct.pack(">i", round(value * 2**16))
  xyz = lambda values: b"XYZ \0\0\0\0" + b"".join(map(number, values))
  white = (0.9642, 1.0, 0.8249)
  curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
  text = name.encode() + b"\0"
  tags = {
    b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
    b"cprt": b"text\0\0\0\0none\0",
    b"wtpt": xyz(white),
    **{key: xyz(one) for key, one in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)},
    **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
  }
  table, content, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
  for key, value in tags.items():
    value += bytes(-len(value) % 4)
    table += key + struct.pack(">II", start + len(content), len(value))
    content += value
  head = (
    struct.pack(
      ">I4xI4s4s4s6H",
      start + len(content),
      0x02400000,
      b"mntr",
      b"RGB ",
      b"XYZ ",
      2024,
      1,
      1,
      0,
      0,
      0,
    )
    + b"acsp"
  )
  return head.ljust(68, b"\0") + b"".join(map(number, white)) + bytes(48) + table + content


DISPLAY_P3 = matrix_profile(
  "Display P3",
  [(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)],
  2.2,
)
ADOBE_RGB = matrix_profile(
  "Adobe RGB (1998)",
  [(0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)],
  2.2,
)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize(
  "profile, name, wanted",
  [
    # by the primaries' matrices: green is more than sRGB has, and clipped; grey is grey
    (DISPLAY_P3, "Display P3", (0, 205, 0)),
    (ADOBE_RGB, "Adobe RGB (1998)", (0, 201, 36)),
  ],
)
def test_colour_profiles_are_heeded(tmp_path, suffix, profile, name, wanted):
  image = Image.new("RGB", (16, 16), (60, 200, 60))
  image.paste((128, 128, 128), (0, 0, 8, 16))
  lossy = {"quality": 98} if suffix in ("jpg", "webp") else {}
  path = _save(tmp_path / f"a.{suffix}", image, icc_profile=profile, **lossy)
  frames, said = conditioning_files.read_image(path, 16, 16)
  assert said == f"a.{suffix}: 16x16, made sRGB from {name}"
  assert np.abs(frames[0, 8, 13].astype(int) - wanted).max() <= 8
  assert np.abs(frames[0, 8, 2].astype(int) - 128).max() <= 4


def test_profiles_with_transparency_and_palettes(tmp_path):
  """The colours are converted, the alpha channel is not."""
  image = Image.new("RGBA", (16, 16), (60, 200, 60, 255))
  image.paste((60, 200, 60, 0), (0, 0, 8, 16))
  for name, kept in (
    ("a.png", image),
    ("b.png", image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)),
  ):
    frames, said = conditioning_files.read_image(
      _save(tmp_path / name, kept, icc_profile=DISPLAY_P3), 16, 16
    )
    assert "made sRGB from Display P3" in said
    assert np.abs(frames[0, 8, 13].astype(int) - (0, 205, 0)).max() <= 8
    if name == "a.png":
      assert frames[0, 8, 2].tolist() == [0, 0, 0] and "transparency shown on black" in said


def test_a_profile_of_srgb_changes_nothing(tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
  profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
  frames, said = conditioning_files.read_image(
    _save(tmp_path / "a.png", image, icc_profile=profile), 16, 16
  )
  np.testing.assert_array_equal(frames[0], image)
  assert said == ""


@pytest.mark.parametrize("profile, kind", [(b"no profile" * 20, "RGB"), (DISPLAY_P3, "L")])
def test_a_profile_that_does_not_fit_is_said(tmp_path, profile, kind):
  image = Image.new(kind, (16, 16), 90 if kind == "L" else (90, 90, 90))
  frames, said = conditioning_files.read_image(
    _save(tmp_path / "a.png", image, icc_profile=profile), 16, 16
  )
  assert (frames == 90).all()
  assert said == "a.png: 16x16, its colour profile left out, which cannot be used"


@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
@pytest.mark.parametrize("read", ["read_image", "read_video"])
def test_heic_is_refused_in_one_line(tmp_path, brand, read):
  path = tmp_path / "photo.heic"
  head = struct.pack(">I4s4sI4s4s", 24, b"ftyp", brand, 0, b"mif1", b"heic")
  path.write_bytes(head + bytes(200))
  arguments = (16, 16) if read == "read_image" else (16, 16, 8)
  with pytest.raises(UserError, match="is a HEIC picture, .*; save it as JPEG$"):
    getattr(conditioning_files, read)(path, *arguments)
