"""Images become the patches that transformers makes of them, to the bit."""

import dataclasses
import io
import os
import subprocess
import sys

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from diffusiongemma.config import VisionConfig
from diffusiongemma.generation import images

Image = pytest.importorskip(
  'PIL.Image', reason='Pillow is installed by the [images] extra'
)
VISION = VisionConfig()
IMAGE, BEGIN, END = 258880, 255999, 258882


@pytest.fixture(scope='module')
def processing():
  """transformers' image processing without torchvision."""
  return pytest.importorskip(
    'transformers.models.gemma4.image_processing_pil_gemma4',
    reason='transformers is installed by the [test] extra',
  )


def random_pixels(height, width, seed=0):
  """Noise over a ramp, so that a turned or mirrored copy is another image."""
  rng = np.random.default_rng(seed)
  ramp = (
    np.linspace(0, 120, height)[:, None, None]
    + np.linspace(0, 80, width)[None, :, None]
  )
  noise = rng.integers(0, 56, (height, width, 3))
  return (ramp + noise).astype(np.uint8)


@pytest.mark.parametrize('budget', images.BUDGETS)
def test_equals_transformers(processing, budget):
  # A square, the target size itself, small, narrow both ways, and large.
  sizes = [(48, 48), (672, 960), (37, 91), (5, 1500), (900, 2), (1301, 700)]
  sources = [random_pixels(*size, seed) for seed, size in enumerate(sizes)]
  theirs = processing.Gemma4ImageProcessorPil(max_soft_tokens=budget)(
    [Image.fromarray(pixels) for pixels in sources], return_tensors='np'
  )
  ours = images.preprocess(sources, VISION, budget)
  assert ours.patches_IMX.dtype == np.float32
  assert ours.positions_IM2.dtype == np.int32
  np.testing.assert_array_equal(ours.patches_IMX, theirs.pixel_values)
  np.testing.assert_array_equal(ours.positions_IM2, theirs.image_position_ids)
  assert ours.counts_I.tolist() == list(theirs.num_soft_tokens_per_image)
  assert ours.counts_I.min() > 0 and ours.counts_I.max() <= budget


@hypothesis.given(
  st.integers(1, 20000),
  st.integers(1, 20000),
  st.sampled_from(images.BUDGETS),
  st.sampled_from([(16, 3), (14, 2), (7, 1)]),
)
def test_target_size_equals_transformers(
  processing, height, width, budget, patch_and_kernel
):
  patch, kernel = patch_and_kernel
  vision = VisionConfig(patch_size=patch, pooling_kernel=kernel)
  size = images.target_size(height, width, vision, budget)
  assert size == processing.get_aspect_ratio_preserving_size(
    height, width, patch, budget * kernel**2, kernel
  )
  assert min(size) > 0 and all(side % (patch * kernel) == 0 for side in size)
  assert size[0] * size[1] <= budget * (patch * kernel) ** 2


@pytest.mark.parametrize(
  ('mode', 'suffix', 'options'),
  [
    ('RGB', 'png', {}),
    ('RGB', 'jpg', {}),
    ('RGB', 'webp', {}),
    ('RGB', 'bmp', {}),
    ('RGB', 'tiff', {}),
    ('RGB', 'ppm', {}),
    ('CMYK', 'jpg', {}),
    ('RGBA', 'png', {}),
    ('LA', 'png', {}),
    ('P', 'gif', {'transparency': 3}),
    ('P', 'png', {'transparency': 3}),
    ('L', 'png', {}),
    ('1', 'png', {}),
    ('I;16', 'png', {}),
  ],
)
def test_files_equal_transformers(processing, tmp_path, mode, suffix, options):
  path = str(tmp_path / f'image.{suffix}')
  if mode == 'I;16':
    image = Image.fromarray(random_pixels(40, 30)[..., 0].astype(np.uint16))
  else:
    image = Image.fromarray(random_pixels(40, 30)).convert(mode)
  if 'A' in mode:
    alpha = random_pixels(40, 30, 1)[..., 0]
    image.putalpha(Image.fromarray(alpha))
  image.save(path, **options)
  processor = processing.Gemma4ImageProcessorPil(max_soft_tokens=70)
  # They treat a file and an image opened from it each in their own way.
  for source in (path, Image.open(path)):
    theirs = processor(source, return_tensors='np')
    ours = images.preprocess([source], VISION, 70)
    np.testing.assert_array_equal(ours.patches_IMX, theirs.pixel_values)
    np.testing.assert_array_equal(ours.positions_IM2, theirs.image_position_ids)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_files_are_turned_upright(processing, tmp_path, orientation):
  path = str(tmp_path / 'photo.png')
  exif = Image.Exif()
  exif[274] = orientation
  lying = random_pixels(20, 50)
  Image.fromarray(lying).save(path, exif=exif)
  pixels = images.load_image(path)
  assert pixels.shape == ((20, 50, 3) if orientation < 5 else (50, 20, 3))
  assert (pixels.shape == lying.shape and (pixels == lying).all()) == (
    orientation == 1
  )
  np.testing.assert_array_equal(images.load_image(Image.open(path)), lying)
  theirs = processing.Gemma4ImageProcessorPil(max_soft_tokens=70)(
    path, return_tensors='np'
  )
  ours = images.preprocess([path], VISION, 70)
  np.testing.assert_array_equal(ours.patches_IMX, theirs.pixel_values)


def test_sources_are_one_image(tmp_path):
  pixels = random_pixels(20, 30)
  path = tmp_path / 'image.png'
  Image.fromarray(pixels).save(path)
  for source in (pixels, Image.fromarray(pixels), path, str(path)):
    np.testing.assert_array_equal(images.load_image(source), pixels)


def test_animations_are_their_first_frame(tmp_path):
  frames = [
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (40, 200)
  ]
  for suffix in ('gif', 'webp', 'png', 'tiff'):
    path = tmp_path / f'animation.{suffix}'
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert abs(images.load_image(path).astype(int) - 40).max() < 3


def test_patches_by_hand():
  """Patch 2 of a 2 x 2 image, at (0, 1), holds its lower left quarter."""
  vision = VisionConfig(patch_size=4, pooling_kernel=1)
  # 8 x 8 becomes 32 x 32, 8 x 8 patches of 4 x 4.
  pixels = random_pixels(32, 32)
  ours = images.preprocess([pixels], vision, 70)
  assert ours.counts_I.tolist() == [64]
  for patch in (0, 1, 17, 63):
    x, y = patch % 8, patch // 8
    assert ours.positions_IM2[0, patch].tolist() == [x, y]
    square = pixels[4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
    np.testing.assert_allclose(
      ours.patches_IMX[0, patch], square.reshape(-1) / 255, rtol=1e-6
    )
  assert np.all(ours.positions_IM2[0, 64:] == -1)
  assert np.all(ours.patches_IMX[0, 64:] == 0)


def test_default_budget_and_no_images():
  pixels = random_pixels(30, 30)
  default = images.preprocess([pixels], VISION)
  assert default.patches_IMX.shape == (1, 280 * 9, 768)
  small = dataclasses.replace(VISION, soft_tokens_per_image=70)
  assert images.preprocess([], small).patches_IMX.shape == (0, 630, 768)


def damaged_files(folder):
  """(file, what its message says)"""
  (folder / 'text.png').write_text('not an image')
  yield 'text.png', 'is not an image of a known format'
  (folder / 'empty.jpg').write_bytes(b'')
  yield 'empty.jpg', 'is not an image of a known format'
  (folder / 'script.eps').write_bytes(
    b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n'
  )
  yield 'script.eps', 'is not an image of a known format'
  (folder / 'folder.png').mkdir()
  yield 'folder.png', 'is a folder, not an image'
  yield 'missing.png', 'is not a file'
  yield 'nul\0.png', 'is not a file'
  os.mkfifo(folder / 'pipe.png')
  yield 'pipe.png', 'is not a file'
  for suffix in ('png', 'jpg', 'webp', 'gif', 'tiff', 'bmp'):
    file = folder / f'cut.{suffix}'
    Image.fromarray(random_pixels(60, 60)).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    yield file.name, 'cannot be read as an image'
  yield 'https://host/image.png', 'is not a file'


def test_files_that_are_no_images(tmp_path):
  for name, message in damaged_files(tmp_path):
    path = name if '://' in name else str(tmp_path / name)
    with pytest.raises(images.ImageError, match=message) as caught:
      images.preprocess([random_pixels(9, 9), path], VISION)
    assert repr(path) in str(caught.value)
    assert '\n' not in str(caught.value)


def test_truncated_pillow_image(tmp_path):
  path = tmp_path / 'cut.png'
  Image.fromarray(random_pixels(60, 60)).save(path)
  path.write_bytes(path.read_bytes()[:3000])
  with pytest.raises(images.ImageError, match='The Pillow image cannot be'):
    images.load_image(Image.open(path))


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_images_too_large_for_pillow(tmp_path, monkeypatch):
  path = tmp_path / 'bomb.png'
  Image.fromarray(random_pixels(30, 40)).save(path)
  # Pillow itself raises at twice the limit and warns from there to the limit.
  for limit, message in ((599, 'is too large'), (1199, '40 x 30 pixels')):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', limit)
    with pytest.raises(images.ImageError, match=message) as caught:
      images.load_image(path)
    assert 'bomb.png' in str(caught.value)
  for limit in (1200, None):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', limit)
    assert images.load_image(path).shape == (30, 40, 3)


def encoded(suffix):
  file = io.BytesIO()
  Image.fromarray(random_pixels(12, 10)).save(file, suffix)
  return file.getvalue()


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize(
  'suffix', ['png', 'jpeg', 'gif', 'webp', 'tiff', 'bmp']
)
def test_damaged_files_are_images_or_image_errors(tmp_path, suffix):
  path, whole = tmp_path / 'image', encoded(suffix)

  @hypothesis.settings(max_examples=40, deadline=None)
  @hypothesis.given(
    st.lists(
      st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)),
      min_size=1,
      max_size=4,
    ),
    st.integers(0, len(whole)),
  )
  def check(changes, cut):
    data = bytearray(whole)
    for place, value in changes:
      data[place] = value
    path.write_bytes(data if cut % 2 else data[:cut])
    try:
      pixels = images.load_image(path)
    except images.ImageError as error:
      assert repr(str(path)) in str(error)
    else:
      assert pixels.dtype == np.uint8 and pixels.shape[2:] == (3,)

  check()


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    (np.zeros((4, 4, 3)), r'is float64 \[4, 4, 3\]'),
    (np.zeros((4, 4), np.uint8), r'is uint8 \[4, 4\]'),
    (np.zeros((3, 4, 4), np.uint8), r'is uint8 \[3, 4, 4\]'),
    (np.zeros((0, 4, 3), np.uint8), 'has no pixels'),
    (Image.new('RGB', (0, 4)), 'has no pixels'),
    (Image.new('RGBA', (4, 0)), 'has no pixels'),
    (b'bytes', 'not a bytes'),
    (None, 'not a NoneType'),
  ],
)
def test_sources_that_are_no_images(source, message):
  with pytest.raises(images.ImageError, match=message):
    images.load_image(source)


def test_budgets_and_tables():
  pixels = random_pixels(30, 30)
  for budget in (0, 100, -70):
    with pytest.raises(images.ImageError, match=f'not {budget}'):
      images.preprocess([pixels], VISION, budget)
  small = dataclasses.replace(VISION, position_table_size=41)
  with pytest.raises(images.ImageError, match='Image 1 becomes 42 x 12'):
    images.preprocess([pixels, random_pixels(30, 90)], small, 70)


def test_module_needs_no_pillow(tmp_path):
  code = (
    'import sys; sys.modules["PIL"] = None; import numpy as np\n'
    'from diffusiongemma.config import VisionConfig\n'
    'from diffusiongemma.generation import images\n'
    'try: images.preprocess(["a.png"], VisionConfig())\n'
    'except images.ImageError as error: print(error)\n'
    'try: images.preprocess([np.zeros((9, 9, 3), np.uint8)], VisionConfig())\n'
    'except images.ImageError as error: print(error)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  line = 'Images need Pillow: pip install pillow.\n'
  assert done.stdout == 2 * line


def test_expand_image_tokens():
  expand = images.expand_image_tokens
  assert expand([7, 8], [], VISION) == [7, 8]
  assert expand([7, IMAGE, 8, IMAGE], np.asarray([2, 1]), VISION) == (
    [7, BEGIN, IMAGE, IMAGE, END, 8, BEGIN, IMAGE, END]
  )
  assert expand([IMAGE, IMAGE], [1, 2], VISION) == (
    [BEGIN, IMAGE, END, BEGIN, IMAGE, IMAGE, END]
  )
  # Markers elsewhere are none of its business.
  assert expand([END, IMAGE, BEGIN], [1], VISION) == (
    [END, BEGIN, IMAGE, END, BEGIN]
  )


@pytest.mark.parametrize(
  ('tokens', 'counts', 'message'),
  [
    ([7, IMAGE], [2, 2], '1 image tokens, and there are 2 images'),
    ([7, IMAGE], [], '1 image tokens, and there are 0 images'),
    ([7], [2], '0 image tokens, and there are 1 images'),
    ([BEGIN, IMAGE, END], [2], 'Token 1 of the prompt .* already'),
    ([BEGIN, IMAGE], [2], 'Token 1 of the prompt .* already'),
    ([7, 8, IMAGE, END], [2], 'Token 2 of the prompt .* already'),
    ([BEGIN, IMAGE, IMAGE, END], [2], 'Token 1 of the prompt .* already'),
  ],
)
def test_prompts_and_images_that_do_not_match(tokens, counts, message):
  with pytest.raises(images.ImageError, match=message):
    images.expand_image_tokens(tokens, counts, VISION)


def test_place():
  tokens_BP = np.asarray(
    [
      [7, BEGIN, IMAGE, IMAGE, END, IMAGE, 8, 0, 0],
      [7, 8, 9, 0, 0, 0, 0, 0, 0],
      [IMAGE, IMAGE, IMAGE, IMAGE, 7, IMAGE, 0, 0, 0],
    ],
    np.int32,
  )
  index_BP = images.place(tokens_BP, [[2, 1], [], [1, 3, 1]], VISION, 4)
  assert index_BP.dtype == np.int32
  # Images 0..4 have rows 0, 4, 8, 12 and 16 first.
  assert index_BP.tolist() == [
    [-1, -1, 0, 1, -1, 4, -1, -1, -1],
    [-1] * 9,
    [8, 12, 13, 14, -1, 16, -1, -1, -1],
  ]
  for counts, message in (
    ([[2], [], [1, 3, 1]], 'Prompt 0 has 3 image tokens, .* have 2'),
    ([[2, 1], [1], [1, 3, 1]], 'Prompt 1 has 0 image tokens, .* have 1'),
    ([[2, 1], [], [5]], 'Prompt 2 has an image of 5 .* 1 to 4'),
    ([[3, 0], [], [1, 3, 1]], 'Prompt 0 has an image of 0'),
    ([[2, 1], []], '3 prompts have 2 lists'),
  ):
    with pytest.raises(images.ImageError, match=message):
      images.place(tokens_BP, counts, VISION, 4)


def test_expanded_prompts_are_placed():
  sources = [random_pixels(30, 30), random_pixels(20, 90)]
  patches = images.preprocess(sources, VISION, 70)
  counts = patches.counts_I.tolist()
  tokens = images.expand_image_tokens([5, IMAGE, 6, IMAGE], counts, VISION)
  index_BP = images.place(np.asarray([tokens]), [counts], VISION, 70)
  expected = [*range(counts[0]), *range(70, 70 + counts[1])]
  assert index_BP[index_BP >= 0].tolist() == expected
