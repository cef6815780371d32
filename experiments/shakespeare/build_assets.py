"""Builds the shipped corpus and its tokenizer (run once; results committed).

  python -m experiments.shakespeare.build_assets --source=FOLDER --pieces=0

FOLDER holds one UTF-8 text file per work of Shakespeare (public domain, as
published by Project Gutenberg, without its header), named `hamlet_gut.txt`
and so on. Lines lose the spaces around them: one play in the collection is
indented, and a young network that has seen it writes pages of nothing but
spaces. Three plays are held out; neither the network nor the tokenizer sees
them in training. Writes into `diffusiongemma/assets/`:

  shakespeare.jsonl.xz   {"title": ..., "split": "train" | "heldout", "text"}
  shakespeare.model      SentencePiece, 2,048 pieces, trained on `train`

The tokenizer that is committed was trained before lines lost their spaces;
`--pieces=0` keeps it.

Takes about twenty seconds on two cores.
"""

import json
import lzma
import pathlib
import re

from absl import app
from absl import flags

from diffusiongemma.text import tokenizer as tokenizers

_SOURCE = flags.DEFINE_string('source', None, 'Folder of *_gut.txt files.')
_PIECES = flags.DEFINE_integer(
  'pieces', 2048, 'Size of the vocabulary; 0 keeps the tokenizer.'
)
flags.mark_flag_as_required('source')

HELDOUT = ('macbeth', 'tempest', 'twelfth_night')
ASSETS = pathlib.Path(__file__).parents[2] / 'diffusiongemma' / 'assets'


def read_works(source: pathlib.Path) -> list[dict[str, str]]:
  """One record per file, in the order of their names."""
  records = []
  for path in sorted(source.glob('*_gut.txt')):
    title = path.name.removesuffix('_gut.txt')
    records.append(
      {
        'title': title,
        'split': 'heldout' if title in HELDOUT else 'train',
        'text': re.sub('(?m)^ +| +$', '', path.read_text(encoding='utf-8')),
      }
    )
  missing = set(HELDOUT) - {record['title'] for record in records}
  if missing:
    raise app.UsageError(f'{source} lacks {sorted(missing)}.')
  return records


def main(argv: list[str]) -> None:
  del argv
  records = read_works(pathlib.Path(_SOURCE.value))
  lines = ''.join(json.dumps(record) + '\n' for record in records)
  archive = lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME)
  ASSETS.mkdir(exist_ok=True)
  (ASSETS / 'shakespeare.jsonl.xz').write_bytes(archive)
  if _PIECES.value:
    text = ''.join(r['text'] for r in records if r['split'] == 'train')
    model = tokenizers.train(text.splitlines(), _PIECES.value)
    (ASSETS / 'shakespeare.model').write_bytes(model)
  print(f'{len(records)} works, {len(archive):,} bytes of corpus archive')


if __name__ == '__main__':
  app.run(main)
