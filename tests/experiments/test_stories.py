"""Stories are grammatical as far as can be told without a parser, and the judge
reads its parser's answers."""

import json
import random
import re

import pytest

from experiments.stories import judge
from experiments.stories import make

RULES = make.read_phrases(make.PHRASES.read_text(encoding='utf-8'))
STORIES = make.make_stories(300, seed=3)
# What link-parser 5.12 answers to: I saw a dog. / dog the ran cat the. /
# You poor thing. / It ran.
PARSED = """verbosity set to 1
graphics set to 0
limit set to 100
Found 4 linkages (3 of 4 random linkages had no P.P. violations)
\tLinkage 1, cost vector = (UNUSED=0 DIS= 0.90 LEN=13)
No complete linkages found.
Found 5 linkages (5 had no P.P. violations) at null count 2
\tLinkage 1, cost vector = (UNUSED=2 DIS= 0.00 LEN=9)
No complete linkages found.
Found 1 linkage (1 had no P.P. violations) at null count 1
\tUnique linkage, cost vector = (UNUSED=1 DIS= 0.00 LEN=4)
Found 1 linkage (1 had no P.P. violations)
\tUnique linkage, cost vector = (UNUSED=0 DIS= 0.10 LEN=3)
Bye.
"""


def test_everything_follows_from_the_seed():
  assert make.make_stories(5, 1) == make.make_stories(5, 1)
  assert make.make_stories(5, 1) != make.make_stories(5, 2)
  assert len(set(STORIES)) == len(STORIES)


def test_stories_are_well_formed():
  for story in STORIES:
    assert make.SHORTEST <= len(story.split()) <= make.LONGEST
    assert re.search(r'[.!?]"?$', story)
    assert story[0].isupper()
    assert not re.search(
      r'  |[{}\[\]|]| [.,!?]|[.,!?][A-Za-z]|\n[^A-Z"\n]', story
    )
    assert all(p.count('"') % 2 == 0 for p in story.split('\n\n'))


def test_articles_fit():
  for story in STORIES:
    for article, word in re.findall(r'\b([Aa]n?) (\w+)', story):
      vowel = word[0] in 'aeiou' or word == 'hour'
      assert (article in ('an', 'An')) == vowel, (article, word)
  assert make.mend('a apple and a pear. a old one') == (
    'An apple and a pear. An old one'
  )


def test_nothing_is_said_twice():
  for story in STORIES:
    said = make.sentences(story)
    assert len(said) == len(set(said))


def test_sentences():
  text = 'He ran. "Stop!" she cried. "Why?" He laughed.\n\n"It is I," he said.'
  assert make.sentences(text) == [
    'He ran.',
    '"Stop!" she cried.',
    '"Why?"',
    'He laughed.',
    '"It is I," he said.',
  ]


def test_no_pronoun_without_a_person():
  """Only those that are in a story are `he` or `she`."""
  men = {*make.BOYS, 'Dad', 'Grandpa', 'Jim', 'turtle', 'beaver', 'king'}
  women = {*make.GIRLS, 'Mom', 'Grandma', 'Rose', 'owl', 'goose', 'mother'}
  # A hero's name tells, but of animals both kinds of names are the same.
  for story in STORIES:
    found = set(re.findall(r'\w+', story))
    if found & {'he', 'He', 'his', 'him', 'himself'}:
      assert found & men, story
    if found & {'she', 'She', 'her', 'herself'}:
      assert found & women, story


def test_pronouns_mean_one_person():
  t = make.Teller(random.Random(0), RULES)
  t.people = {
    'H': make.Person('Tom', 'he', 'boy'),
    'F': make.Person('Ben', 'he', 'boy'),
    'P': make.Person('Mom', 'she'),
  }
  assert t.refer('H', 'he') == 'Tom'  # Nobody has been named yet.
  assert t.refer('H', 'his') == 'his'
  assert t.refer('P', '') == 'Mom'
  t.end_sentence()
  assert (t.refer('H', 'he'), t.refer('P', 'him')) == ('he', 'her')
  assert t.refer('F', 'his') == "Ben's"
  assert t.refer('H', 'his') == "Tom's"  # Ben's, it could be.
  t.begin_paragraph()
  assert t.refer('P', 'he') == 'Mom'


def test_every_phrase_can_be_told():
  """All its rules and words exist."""
  for world in ('child', 'forest'):
    for scheme in make.SCHEMES:
      t = make.Teller(random.Random(1), RULES)
      t.flags |= {world, 'F', 'P'}
      make.cast(t, world, scheme)
      for phrases in RULES.values():
        for phrase in phrases:
          slots = ('do', 'fear') if scheme not in ('learn', 'fear') else ()
          t.words |= dict.fromkeys(slots, 'swim')
          t.words.setdefault('oops', '')
          t.words.setdefault('tip', '')
          t.words.setdefault('do', '')
          t.words.setdefault('fear', '')
          assert '{=' not in t.expand(phrase.text)


def test_lines_are_prompts_and_responses():
  records = [
    json.loads(make.to_line(story, random.Random(i)))
    for i, story in enumerate(STORIES)
  ]
  for record, story in zip(records, STORIES, strict=True):
    assert record['prompt'] + record['response'] == story
    assert not record['prompt'] or record['response'].startswith(' ')
  without = sum(not record['prompt'] for record in records)
  assert 100 < without < 200


def test_linkages():
  assert judge.read_linkages(PARSED) == [True, False, False, True]


def test_simplified_for_the_parser():
  assert judge.simplify('"Help!" he cried.') == '"Help," he cried.'
  assert judge.simplify('"Thank you.') == 'Thank you.'
  assert judge.simplify('"Is it you?"') == '"Is it you?"'


def test_shuffled_words_are_the_same_words():
  story = STORIES[0]
  shuffled = judge.shuffle_words(story, random.Random(0))
  words = lambda text: sorted(judge.WORD.findall(text.lower()))
  assert words(shuffled) == words(story) and shuffled != story


def test_words_in_a_list():
  known = {'the', 'dog', 'Tom', 'saw'}
  assert judge.share_of_words("The dog saw Tom's dog.", known) == 1
  assert judge.share_of_words('The dgo', known) == pytest.approx(0.5)


def test_copies():
  story = ' '.join(f'w{i}' for i in range(40))
  copies = judge.Copies([story])
  assert copies.is_copy(story) and copies.longest(story) == 40
  half = ' '.join(story.split()[:22]) + ' and then'
  assert not copies.is_copy(half) and copies.longest(half) == 20
  assert copies.longest('nothing of this was there before') == 0
