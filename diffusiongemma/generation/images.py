"""Images to patches, and their positions in the tokens of a prompt.

  resize    to the largest (h, w), multiples of kernel * patch_size, with
            h w <= soft_tokens * (kernel * patch_size)^2 and h : w kept
  patches   row by row; the pixels of one in the order (row, column, channel)
  prompt    image  ->  begin, image * count, end
  count     h w / (kernel * patch_size)^2 soft tokens, at most the budget

Needs Pillow, the extra `images`, to read and to resize.
"""

from collections.abc import Sequence
import math
import os
from typing import Any
from typing import NamedTuple

import numpy as np

from diffusiongemma.config import VisionConfig
from diffusiongemma.errors import Error

BUDGETS = (70, 140, 280, 560, 1120)

# Formats that are read. Pillow knows more; one of them (EPS) runs a system
# program on an untrusted file.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM', 'AVIF')


class ImageError(Error, ValueError):
  """An image or a prompt with images that can't be used."""


class Patches(NamedTuple):
  """Images in the form of `VisionEncoder`.

  Attributes:
    patches_IMX: float32, pixel values 0..1, zeros at padding.
    positions_IM2: int32, (x, y) of each patch in its image, -1 at padding.
    counts_I: int32, soft tokens of each image.
  """

  patches_IMX: np.ndarray
  positions_IM2: np.ndarray
  counts_I: np.ndarray


def load_image(source: Any) -> np.ndarray:
  """An image as uint8 [height, width, 3], red, green and blue.

  Bit-equal to transformers: a file is rotated upright by its EXIF tag, and its
  alpha channel is dropped; a Pillow image is not rotated, and put on white. Of
  an animation the first frame is used.

  Args:
    source: path of a file, a Pillow image, or a uint8 array [height, width,
      3].

  Raises:
    ImageError: there is no such file, it is damaged, of no known format or has
      more pixels than `PIL.Image.MAX_IMAGE_PIXELS`; an array of another type or
      shape; an image without pixels; Pillow is not installed.
  """
  if isinstance(source, np.ndarray):
    name, pixels = 'The array', source
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
      raise ImageError(
        'An array is an image if it is uint8 [height, width, 3]; this one is '
        f'{source.dtype} {list(source.shape)}.'
      )
  elif isinstance(source, (str, os.PathLike)):
    source = os.path.expanduser(source)
    name = repr(source)
    pixels = _read_file(source, name)
  elif isinstance(source, _pillow().Image):
    name = 'The Pillow image'
    try:
      pixels = _on_white(source)
    except Exception as error:  # Pillow may decode its file only now.
      raise ImageError(f'{name} cannot be read: {_reason(error)}') from error
  else:
    raise ImageError(
      'An image is a path, a Pillow image or an array, not a '
      f'{type(source).__name__}.'
    )
  if not pixels.size:
    raise ImageError(f'{name} has no pixels.')
  return pixels


def _pillow():
  """Pillow's `Image` module."""
  try:
    from PIL import Image
  except ImportError as error:
    raise ImageError('Images need Pillow: pip install pillow.') from error
  return Image


def _read_file(path: str | os.PathLike[str], name: str) -> np.ndarray:
  Image = _pillow()
  from PIL import ImageOps

  if not os.path.isfile(path):
    what = 'a folder, not an image' if os.path.isdir(path) else 'not a file'
    raise ImageError(f'{name} is {what}.')
  try:
    with Image.open(path, formats=FORMATS) as image:
      # Pillow only warns up to twice its limit.
      limit = Image.MAX_IMAGE_PIXELS
      if limit is not None and image.width * image.height > limit:
        raise ImageError(
          f'{name} has {image.width} x {image.height} pixels, more than the '
          f'limit of {limit}.'
        )
      return _on_white(ImageOps.exif_transpose(image).convert('RGB'))
  except ImageError:
    raise
  except (
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
  ) as error:
    raise ImageError(f'{name} is too large: {error}') from error
  except Image.UnidentifiedImageError as error:
    raise ImageError(
      f'{name} is not an image of a known format ({", ".join(FORMATS)}).'
    ) from error
  except Exception as error:  # Decoders raise anything for damaged files.
    raise ImageError(
      f'{name} cannot be read as an image: {_reason(error)}'
    ) from error


def _on_white(image: Any) -> np.ndarray:
  """RGB of a Pillow image, put on white if it has an alpha channel or a
  transparent colour (which survives a conversion to RGB)."""
  Image = _pillow()
  transparent = image.info.get('transparency') is not None
  if transparent or 'A' in image.getbands():
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(white, image)
  return np.array(image.convert('RGB'))


def _reason(error: Exception) -> str:
  return str(error) or type(error).__name__


def target_size(
  height: int, width: int, vision: VisionConfig, soft_tokens: int
) -> tuple[int, int]:
  """(height, width) in pixels that an image is scaled to, up or down.

  Both are rounded down to units of `pooling_kernel * patch_size`, which may
  change the aspect ratio a little. If a side would vanish, it gets one unit and
  the other `soft_tokens` units: an even narrower image is distorted.
  Source: transformers' Gemma4ImageProcessor, with its order of roundings.
  """
  unit = vision.pooling_kernel * vision.patch_size
  factor = math.sqrt(soft_tokens * unit**2 / (height * width))
  rows = math.floor(factor * height / unit)
  columns = math.floor(factor * width / unit)
  if rows == 0:
    rows, columns = 1, soft_tokens
  elif columns == 0:
    rows, columns = soft_tokens, 1
  return rows * unit, columns * unit


def preprocess(
  images: Sequence[Any],
  vision: VisionConfig,
  soft_tokens: int | None = None,
) -> Patches:
  """Scales images and cuts them into patches.

  Args:
    images: arguments of `load_image`.
    vision: patch size and pooling; the grid must fit its position table.
    soft_tokens: most soft tokens of an image, one of `BUDGETS`; None is that of
      the config. Every image is padded to as many patches as that needs.

  Raises:
    ImageError: as in `load_image`; another budget; a side with more patches
      than the position table has.
  """
  if soft_tokens is None:
    soft_tokens = vision.soft_tokens_per_image
  if soft_tokens not in BUDGETS:
    raise ImageError(
      f'An image has one of {", ".join(map(str, BUDGETS))} soft tokens at '
      f'most, not {soft_tokens}.'
    )
  patch, kernel = vision.patch_size, vision.pooling_kernel
  num_patches = soft_tokens * kernel**2
  patches_IMX = np.zeros((len(images), num_patches, 3 * patch**2), np.float32)
  positions_IM2 = np.full((len(images), num_patches, 2), -1, np.int32)
  counts_I = np.zeros(len(images), np.int32)
  for index, source in enumerate(images):
    pixels = load_image(source)
    height, width = pixels.shape[:2]
    size = target_size(height, width, vision, soft_tokens)
    rows, columns = size[0] // patch, size[1] // patch
    if max(rows, columns) > vision.position_table_size:
      raise ImageError(
        f'Image {index} becomes {columns} x {rows} patches, and the position '
        f'table ends at {vision.position_table_size}.'
      )
    used = rows * columns
    patches_IMX[index, :used] = _cut(_resize(pixels, size), patch)
    y, x = np.divmod(np.arange(used), columns)
    positions_IM2[index, :used] = np.stack([x, y], axis=-1)
    counts_I[index] = used // kernel**2
  return Patches(patches_IMX, positions_IM2, counts_I)


def _resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes bicubically, uint8 to uint8."""
  if pixels.shape[:2] == size:
    return pixels
  Image = _pillow()
  image = Image.fromarray(pixels)
  return np.array(image.resize(size[::-1], Image.Resampling.BICUBIC))


def _cut(pixels: np.ndarray, patch: int) -> np.ndarray:
  """Patches of an image, uint8 [height, width, 3] to float32 [M, X]."""
  height, width, _ = pixels.shape
  grid = pixels.reshape(height // patch, patch, width // patch, patch, 3)
  patches_MX = grid.transpose(0, 2, 1, 3, 4).reshape(-1, 3 * patch**2)
  return patches_MX.astype(np.float32) / 255


def expand_image_tokens(
  tokens: Sequence[int], counts: Sequence[int], vision: VisionConfig
) -> list[int]:
  """Expands the image tokens of a prompt to all soft tokens of each image.

  Args:
    tokens: a prompt with one `image_token_id` for each image.
    counts: soft tokens of its images, in order (`Patches.counts_I`).
    vision: the three ids.

  Returns:
    The prompt with begin, `count` image tokens and end for each image token.

  Raises:
    ImageError: the numbers of images and image tokens differ, or an image token
      already has a begin before it or an end after it.
  """
  image = vision.image_token_id
  begin, end = vision.begin_image_token_id, vision.end_image_token_id
  tokens = [int(token) for token in tokens]
  positions = [i for i, token in enumerate(tokens) if token == image]
  for position in positions:
    before, after = (
      tokens[max(position - 1, 0)],
      tokens[position + 1 : position + 2],
    )
    if before == begin or after == [end]:
      raise ImageError(
        f'Token {position} of the prompt is an image that already has its '
        'begin or end token; these are inserted together with its soft tokens.'
      )
  if len(positions) != len(counts):
    raise ImageError(
      f'The prompt has {len(positions)} image tokens, and there are '
      f'{len(counts)} images.'
    )
  remaining = iter(counts)
  expanded = []
  for token in tokens:
    if token == image:
      expanded += [begin, *[image] * int(next(remaining)), end]
    else:
      expanded.append(token)
  return expanded


def place(
  tokens_BP: np.ndarray,
  counts_of_rows: Sequence[Sequence[int]],
  vision: VisionConfig,
  T: int,
) -> np.ndarray:
  """The soft token of each position of a batch of prompts.

  Args:
    tokens_BP: int32, expanded prompts, padded.
    counts_of_rows: for each prompt, soft tokens of its images, in order.
    vision: the id of image tokens.
    T: of the encoder's [I, T, D]; its images are those of the first
      prompt in order, then those of the second, and so on.

  Returns:
    index_BP, int32: a row of the encoder's [I * T, D], -1 for text. Adjacent
    images are separated by their counts.

  Raises:
    ImageError: a prompt has more or fewer image tokens than its images have
      soft tokens, an image has none or more than T, or the numbers of prompts
      and lists differ.
  """
  if len(counts_of_rows) != len(tokens_BP):
    raise ImageError(
      f'{len(tokens_BP)} prompts have {len(counts_of_rows)} lists of images.'
    )
  index_BP = np.full(tokens_BP.shape, -1, np.int32)
  first = 0
  for row, counts in enumerate(counts_of_rows):
    for count in counts:
      if not 0 < count <= T:
        raise ImageError(
          f'Prompt {row} has an image of {count} soft tokens; it can have 1 to '
          f'{T}.'
        )
    is_image_P = tokens_BP[row] == vision.image_token_id
    if is_image_P.sum() != sum(counts):
      raise ImageError(
        f'Prompt {row} has {is_image_P.sum()} image tokens, and its images '
        f'have {sum(counts)}.'
      )
    rows = [
      (first + image) * T + np.arange(count)
      for image, count in enumerate(counts)
    ]
    if rows:
      index_BP[row, is_image_P] = np.concatenate(rows)
    first += len(counts)
  return index_BP
