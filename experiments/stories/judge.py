r"""How good the English of stories is, and how much of it is copied.

  python -m experiments.stories.judge --stories=FILE --name=corpus
  python -m experiments.stories.judge --workdir=runs/stories --name=network \
      --train=runs/story_text/train.jsonl

judges the first --count lines of a file of stories, or as many that a run
writes (--seeds, openings --prompts). --shuffle puts the words of each sentence
in random order first: a judge that likes those is no judge. For each it prints

  words       share of words that are in a list of English words (--words)
  parsed      share of sentences that link-grammar's parser links completely
  perfect     share of stories of which it links every sentence
  ended       share of stories that end with a full stop or a quotation mark
  distinct    share of stories that no other is equal to
  verbatim    share of stories that are in --train, word by word
  copied      longest run of words that is in --train: mean over stories, most

and writes NAME.json beside this file (--output), the stories too. Bits per byte
of held-out stories are printed by

  python -m diffusiongemma.main --mode=evaluate --workdir=runs/stories

Needs Debian's link-grammar, link-grammar-dictionaries-en and wamerican. The
parser accepts much that is wrong, and refuses some of what is right; so read
some stories as well. Expected: of 300 stories by make.py it links 97 % of the
sentences and all of 68 % of the stories; the others that were looked at are
grammatical. Of 100 with their words shuffled it links 18 % of the sentences and
all of none.
"""

import argparse
from collections.abc import Iterable
import json
import os
import pathlib
import random
import re
import statistics
import subprocess
import sys

from experiments.stories import make

FOLDER = pathlib.Path(__file__).parent
WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
PROMPTS = (
  'Once upon a time',
  'There was a boy named',
  'One sunny morning,',
  'A little girl',
  'Everyone in the forest',
)


def read_stories(path: str, count: int | None = None) -> list[str]:
  """Of lines of JSON: a text, or a prompt and its response."""
  stories = []
  with open(path, encoding='utf-8') as file:
    for line in file:
      if len(stories) == count:
        break
      record = json.loads(line)
      text = record.get('text')
      stories.append(text or record['prompt'] + record['response'])
  return stories


def sample_stories(
  workdir: str, count: int, seeds: Iterable[int], prompts: list[str]
) -> tuple[list[str], dict[str, float]]:
  """(stories that a run writes, what it took): as many from each seed."""
  import diffusiongemma as dg

  run = dg.load(workdir)
  seeds = list(seeds)
  stories, steps, ends = [], [], 0
  for seed in seeds:
    share = -(-count // len(seeds))
    openings = [prompts[i % len(prompts)] for i in range(share)]
    for start in range(0, share, 20):
      some = openings[start : start + 20]
      key = seed * 1000 + start
      for opening, written in zip(
        some, dg.generate(run, some, key=key, max_new_tokens=256), strict=True
      ):
        stories.append(opening + written.text)
        steps.append(written.steps)
        ends += written.stopped_by == 'stop_token'
  spent = {
    'stopped': ends / len(stories),
    'passes': statistics.fmean(steps),
  }
  return stories[:count], spent


def shuffle_words(story: str, rng: random.Random) -> str:
  """The words of each sentence in random order; its marks at its end."""
  return ' '.join(
    _shuffle_sentence(sentence, rng) for sentence in make.sentences(story)
  )


def _shuffle_sentence(sentence: str, rng: random.Random) -> str:
  found = WORD.findall(sentence)
  rng.shuffle(found)
  return (' '.join(found) or 'A').capitalize() + '.'


def share_of_words(story: str, known: set[str]) -> float:
  """How many of the words are in the list, as they are or in small letters."""
  found = WORD.findall(story)
  good = sum(_is_word(word, known) for word in found)
  return good / max(len(found), 1)


def _is_word(word: str, known: set[str]) -> bool:
  stem = word.removesuffix("'s")
  return any(w in known for w in (word, word.lower(), stem, stem.lower()))


def simplify(sentence: str) -> str:
  """For the parser: quotation marks that have lost their other half go."""
  sentence = ' '.join(sentence.split())
  if sentence.count('"') % 2:
    sentence = sentence.replace('"', '')
  # "Help!" he cried: to the parser the sentence would be over.
  return re.sub(r'[!?]"(?= [a-zA-Z])', ',"', sentence)


def parse_sentences(sentences: list[str], program: str) -> list[bool]:
  """Which sentences the parser links completely."""
  parser = subprocess.run(
    [program, 'en', '-graphics=0', '-verbosity=1', '-limit=100', '-timeout=10'],
    # An empty sentence would have no answer.
    input='\n'.join(sentence or 'the of' for sentence in sentences) + '\n',
    capture_output=True,
    text=True,
    check=True,
    env={**os.environ, 'LC_ALL': 'C.UTF-8'},
  )
  linked = read_linkages(parser.stdout)
  if len(linked) != len(sentences):
    raise ValueError(
      f'{program} answered {len(linked)} of {len(sentences)} sentences.'
    )
  return linked


def read_linkages(output: str) -> list[bool]:
  """Of what the parser prints, whether each sentence has a complete linkage.

  A sentence is answered by `Found N linkages (...)`; without a complete one,
  the line `No complete linkages found.` comes before.
  """
  linked, failed = [], False
  for line in output.splitlines():
    if line.startswith('No complete linkages found'):
      if failed:  # Nothing was found for the one before at all.
        linked.append(False)
      failed = True
    elif line.startswith('Found '):
      linked.append(not failed and not re.match(r'Found 0 ', line))
      failed = False
  return linked + [False] * failed


class Copies:
  """Finds runs of words of a story that stand in one of the training stories.

  It keeps all runs of each length in `LENGTHS`, so that lengths are told up to
  the next smaller of them.
  """

  LENGTHS = (5, 10, 15, 20, 25, 30, 40, 50, 60)

  def __init__(self, stories: Iterable[str]):
    self.whole: set[int] = set()
    self.runs: dict[int, set[int]] = {n: set() for n in self.LENGTHS}
    for story in stories:
      self.whole.add(hash(tuple(story.split())))
      for length, runs in self.runs.items():
        runs.update(_runs(story, length))

  def is_copy(self, story: str) -> bool:
    return hash(tuple(story.split())) in self.whole

  def longest(self, story: str) -> int:
    """Words of the longest run that is copied."""
    return max(
      (n for n, runs in self.runs.items() if runs & set(_runs(story, n))),
      default=0,
    )


def _runs(story: str, length: int) -> list[int]:
  found = story.split()
  return [
    hash(tuple(found[i : i + length])) for i in range(len(found) - length + 1)
  ]


def judge(
  stories: list[str], known: set[str], program: str, copies: Copies | None
) -> tuple[dict[str, float], list[str]]:
  """(numbers, sentences that were not linked)."""
  split = [make.sentences(story) for story in stories]
  flat = [simplify(sentence) for said in split for sentence in said]
  linked = parse_sentences(flat, program)
  perfect, start = 0, 0
  for said in split:
    perfect += all(linked[start : start + len(said)])
    start += len(said)
  numbers = {
    'stories': len(stories),
    'sentences': len(flat),
    'words_a_story': statistics.fmean(len(s.split()) for s in stories),
    'words': statistics.fmean(share_of_words(s, known) for s in stories),
    'parsed': sum(linked) / max(len(linked), 1),
    'perfect': perfect / len(stories),
    'ended': sum(s.rstrip().endswith(('.', '!', '?', '"')) for s in stories)
    / len(stories),
    'distinct': len(set(stories)) / len(stories),
  }
  if copies:
    runs = [copies.longest(story) for story in stories]
    numbers['verbatim'] = sum(map(copies.is_copy, stories)) / len(stories)
    numbers['copied_mean'] = statistics.fmean(runs)
    numbers['copied_most'] = max(runs)
  refused = [s for s, ok in zip(flat, linked, strict=True) if not ok]
  return numbers, refused


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument('--stories', help='file of stories')
  source.add_argument('--workdir', help='run that writes them')
  parser.add_argument('--name', required=True, help='of the file of results')
  parser.add_argument('--count', type=int, default=300)
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
  parser.add_argument('--prompts', nargs='+', default=list(PROMPTS))
  parser.add_argument('--shuffle', action='store_true')
  parser.add_argument('--train', help='file of stories that were learnt')
  parser.add_argument('--words', default='/usr/share/dict/american-english')
  parser.add_argument('--link_parser', default='link-parser')
  parser.add_argument('--output', type=pathlib.Path, default=FOLDER)
  given = parser.parse_args()
  try:
    known = set(pathlib.Path(given.words).read_text(encoding='utf-8').split())
    spent = {}
    if given.stories:
      stories = read_stories(given.stories, given.count)
    else:
      stories, spent = sample_stories(
        given.workdir, given.count, given.seeds, given.prompts
      )
    if given.shuffle:
      rng = random.Random(0)
      stories = [shuffle_words(story, rng) for story in stories]
    copies = Copies(read_stories(given.train)) if given.train else None
    numbers, refused = judge(stories, known, given.link_parser, copies)
  except OSError as error:
    sys.exit(f'{error.filename} cannot be used: {error.strerror}.')
  from experiments import machine

  numbers |= spent
  for key, value in numbers.items():
    print(f'{key:14} {value:10.4g}')
  record = {
    'command': ' '.join(sys.argv[1:]),
    **machine.describe(),
    'results': numbers,
    'not_parsed': refused[:50],
    'samples': stories[:20],
  }
  given.output.mkdir(parents=True, exist_ok=True)
  path = given.output / f'{given.name}.json'
  path.write_text(json.dumps(record, indent=2) + '\n', encoding='utf-8')
  print(path)


if __name__ == '__main__':
  main()
