r"""Short, simple stories for children, written by a grammar of events.

  python -m experiments.stories.make --out=runs/stories/train.jsonl \
      --count=60000 --seed=0
  python -m experiments.stories.make --out=runs/stories/heldout.jsonl \
      --count=1000 --seed=1 --tokenizer=

writes a story a line. Of half of them the first words are the "prompt", the
rest is the "response"; of the others all is response. So the network learns to
begin, to go on, and, since canvases are filled with the token that ends a text,
to end. The first command also trains a tokenizer of --pieces pieces on the
stories and writes it beside them. The same seed writes the same bytes.

A story is a scheme (`SCHEMES`): a list of events. What happened so far is a set
of flags; `events.txt` has the phrases of each event, with the flags that they
need and set. A pronoun is written only where it can mean one person, else the
name. Expected: 60,000 stories of 60 to 130 words in about a minute.
"""

import argparse
import json
import os
import pathlib
import random
import re
from typing import NamedTuple

from diffusiongemma.text import tokenizer as tokenizers

PHRASES = pathlib.Path(__file__).parent / 'events.txt'
SHORTEST, LONGEST = 60, 130  # Words of a story.


def words(text: str) -> list[str]:
  """Of a line, one by one."""
  return text.split()


GIRLS = words(
  'Anna Lily Mia Ella Rosa Nora Ruth Emma Clara Maya Zoe Lucy Alice Julia '
  'Molly Sara Tess Wendy Eva Kate'
)
BOYS = words(
  'Tom Ben Sam Max Leo Jack Noah Oscar Peter Hugo Simon Adam Omar Luke Theo '
  'Paul Eric Dan Felix Henry'
)
SPECIES = {
  'mouse': 'hole',
  'rabbit': 'burrow',
  'fox': 'den',
  'bear': 'cave',
  'squirrel': 'nest',
  'hedgehog': 'nest',
  'badger': 'den',
  'mole': 'burrow',
  'raccoon': 'den',
}
THINGS = {
  'child': words(
    'ball kite doll drum whistle scarf hat lantern book marble cap puppet '
    'robot trumpet'
  )
  + ['teddy bear', 'toy boat', 'toy train', 'paint box'],
  'forest': words(
    'shell scarf hat whistle drum basket lantern button bell spoon stone '
    'blanket feather bag ring'
  ),
}
TOYS = words(
  'ball kite doll drum whistle marble puppet robot trumpet shell bell button '
  'feather'
) + ['teddy bear', 'toy boat', 'toy train']
COLORS = words('red blue green yellow white brown orange purple silver black')
PLACES = {
  'child': words(
    'park lake beach river playground market bridge pond fountain harbor '
    'school zoo library'
  ),
  'forest': ['pond', 'stream', 'old mill', 'big oak', 'meadow', 'waterfall']
  + ['lake', 'river', 'bridge', 'hill', 'old well'],
}
# Grown-ups, and those among them whom one visits.
ADULTS = {
  'child': {
    'Mom': 'she',
    'Dad': 'he',
    'Grandma': 'she',
    'Grandpa': 'he',
    'Aunt Rose': 'she',
    'Uncle Jim': 'he',
  },
  'forest': {
    'the old owl': 'she',
    'the old goose': 'she',
    'the wise old turtle': 'he',
    'the old beaver': 'he',
  },
}
VISITED = ('Grandma', 'Grandpa', 'Aunt Rose', 'Uncle Jim')
ANIMALS = {
  'child': words(
    'kitten puppy rabbit hedgehog squirrel duckling lamb fox goat'
  ),
  'forest': words('kitten puppy duckling lamb goat chick lizard fawn'),
}
FOODS = (
  ('a big sandwich', 'sandwich'),
  ('a piece of cake', 'cake'),
  ('a loaf of bread', 'bread'),
  ('a large pancake', 'pancake'),
  ('a little pie', 'pie'),
  ('a sweet roll', 'roll'),
  ('a big cookie', 'cookie'),
)
INDOORS = (
  ('build a tent', 'tent'),
  ('make paper boats', 'boat'),
  ('jump in the puddles', 'puddle'),
  ('cook a big soup', 'soup'),
  ('put on a show', 'show'),
)
# What is made, of what, how it fails, why, and how it ends.
MADE = (
  (
    'kite',
    'paper, string, and two thin sticks',
    '[fell straight down|did not fly at all]',
    'the tail is too short',
    'The kite [rose high above the trees|danced in the wind].',
  ),
  (
    'cake',
    'flour, butter, eggs, and sugar',
    '[burned in the oven|came out black and hard]',
    'the oven was too hot',
    'The cake was [golden|soft and sweet] and smelled wonderful.',
  ),
  (
    'boat',
    'a piece of wood, a stick, and some cloth',
    '[tipped over|sank at once]',
    'the sail is too big',
    'The boat sailed across the pond like a swan.',
  ),
  (
    'birdhouse',
    'four boards, a hammer, and some nails',
    '[fell apart|fell from the tree]',
    'you need longer nails',
    '[The next day|A week later], two birds moved in.',
  ),
  (
    'pie',
    'flour, butter, and a bowl of apples',
    'was [hard as stone|still raw in the middle]',
    '[it needs more time in the oven|the dough was too thick]',
    'The pie was warm and sweet, and everyone had a piece.',
  ),
  (
    'necklace',
    'a long thread and a handful of shells',
    'broke, and the shells rolled everywhere',
    'the thread is too thin',
    'The necklace [shone in the sun|was pretty enough for a queen].',
  ),
  (
    'drum',
    'an old pot, some string, and a piece of leather',
    'made no sound at all',
    'the leather is too loose',
    'Boom, boom! Everyone could hear the drum.',
  ),
  (
    'basket',
    'long grass and thin branches',
    '[had a big hole|broke at once]',
    'you must pull the grass tighter',
    'The basket was strong enough to carry [apples|stones].',
  ),
  (
    'scarf',
    'wool and two needles',
    'was [full of holes|much too short]',
    'you need more wool',
    'The scarf was long, soft, and warm.',
  ),
)
# What one learns, how it goes wrong, advice, where.
LEARNT = (
  (
    'ride a bike',
    '{H.he} [fell off|tipped over]',
    'Look ahead, not at your feet',
    'park',
    'child',
  ),
  (
    'swim',
    '{H.he} [swallowed water|sank like a stone]',
    'Kick with your legs',
    'lake',
    'child',
  ),
  (
    'skate',
    '{H.he} [fell on the ice|landed on the ice]',
    'Bend your knees',
    'pond',
    '',
  ),
  (
    'whistle',
    '[only air came out|there was no sound]',
    'Make your lips round',
    'garden',
    'child',
  ),
  (
    'juggle',
    'all the balls fell [down|on the ground]',
    'Start with two balls',
    'meadow',
    '',
  ),
  (
    'jump rope',
    '{H.his} feet got caught in the rope',
    'Count out loud',
    'playground',
    'child',
  ),
  (
    'play the flute',
    'the sound was [terrible|awful]',
    'Blow softly',
    'hill',
    '',
  ),
  (
    'climb trees',
    '{H.he} slid [down again|to the ground]',
    'Use your arms and your legs',
    'woods',
    '',
  ),
  (
    'read',
    'the letters [all looked the same|made no sense]',
    'Say one letter after the other',
    'library',
    'child',
  ),
)
FEARS = (
  ('the dark', 'dark', ''),
  ('deep water', 'water', 'child'),
  ('high places', 'high', ''),
  ('thunder', 'storm', ''),
  ('dogs', 'dog', 'child'),
  ('singing in front of people', 'stage', 'child'),
)
GAMES = (
  ('play ball', 'played ball'),
  ('play tag', 'played tag'),
  ('build a tower', 'built towers'),
  ('play hide and seek', 'played hide and seek'),
  ('dig a hole', 'dug holes'),
)
CARELESS = ('running', 'dancing', 'jumping around', 'playing ball')
FRAGILE = words('vase cup plate bowl jar pot mug teapot')
FLOWERS = ('sunflower', 'bean plant', 'rosebush', 'corn plant')
TRAILS = ('feathers', 'shells', 'flowers', 'paper stars', 'white stones')
FRUIT = words('apples pears plums berries nuts cherries strawberries')
HIDEOUTS = ('big oak', 'barn', 'wall', 'hedge', 'big rock', 'old mill')

# Events of each scheme: `|` begins a paragraph, `?` tells it half of the time,
# [name] is a word that was chosen.
SCHEMES = {
  'lost': (
    'lost.have lost.go ?scene | lost.notice ?lost.feel lost.search | '
    'lost.meet lost.find.[how] lost.end ?close'
  ),
  'share': (
    'share.have ?scene | share.see ?share.think share.give share.thank '
    '| ?share.return share.end ?close'
  ),
  'weather': (
    'weather.plan weather.rain | weather.sad weather.idea '
    'weather.fun.[fun] | weather.clear ?weather.end ?close'
  ),
  'animal': (
    'animal.find animal.see.[how] | animal.talk animal.fix.[how] | '
    'animal.after ?animal.end close'
  ),
  'make': (
    'make.want make.gather | make.fail make.help | make.again make.done '
    '?make.end close'
  ),
  'fear': (
    'fear.have | fear.tell fear.comfort | fear.act.[how] fear.end ?close'
  ),
  'surprise': (
    'surprise.start surprise.sad | surprise.clue surprise.follow ?scene '
    'surprise.shout | surprise.gift surprise.end ?close'
  ),
  'mistake': (
    'mistake.do mistake.hide | mistake.guilt mistake.tell | '
    'mistake.forgive ?mistake.repair ?mistake.end ?close'
  ),
  'learn': (
    'learn.want learn.try ?learn.frustrated | learn.teach '
    'learn.practice | learn.success ?learn.end close'
  ),
  'visit': (
    'visit.start ?scene | visit.[how] visit.[how].fix | visit.arrive '
    'visit.tea ?close'
  ),
  'seed': (
    'seed.get seed.plant | seed.wait seed.doubt | seed.grow seed.bloom '
    '?seed.end ?close'
  ),
  'quarrel': (
    'quarrel.start quarrel.fight | quarrel.apart | quarrel.sorry '
    'quarrel.reply quarrel.end ?close'
  ),
  'new': (
    'new.start new.alone | ?new.remember new.hello new.answer | new.fun '
    '?new.end close'
  ),
  'night': (
    'night.start night.think | night.brave night.[how] | night.laugh night.end'
  ),
  'save': ('save.see save.ask | save.work save.buy | save.end ?close'),
  'gift': ('save.see save.ask | save.work | save.gift save.giftend ?close'),
}
# Schemes that last longer than a day, happen at home, or at night.
FLAGS = {
  'learn': ('long',),
  'seed': ('long', 'home'),
  'save': ('long', 'home'),
  'gift': ('long', 'home'),
  'fear': ('long', 'home'),
  'mistake': ('long', 'home'),
  'weather': ('home',),
  'make': ('home',),
  'night': ('night', 'home'),
  'visit': (),
  'share': ('long',),
  'animal': ('home',),
  'quarrel': ('long',),
}
# Schemes of people alone.
OF_CHILDREN = ('save', 'gift')

PRONOUNS = {
  'he': {'he': 'he', 'him': 'him', 'his': 'his', 'himself': 'himself'},
  'she': {'he': 'she', 'him': 'her', 'his': 'her', 'himself': 'herself'},
}


class Phrase(NamedTuple):
  """One way to tell an event: flags that it needs, forbids and sets."""

  text: str
  needs: frozenset[str]
  forbids: frozenset[str]
  sets: frozenset[str]


class Person(NamedTuple):
  """A name, 'he' or 'she', and what kind of person or animal."""

  name: str
  gender: str
  kind: str = ''


def read_phrases(text: str) -> dict[str, list[Phrase]]:
  """The rules of `events.txt`; its head says how they are written."""
  text = re.sub(r'(?m)^#.*\n', '', text)
  text = re.sub(r'\n +', ' ', text)
  rules: dict[str, list[Phrase]] = {}
  name = ''
  for line in text.split('\n'):
    if line.startswith('- '):
      flags: dict[str, set[str]] = {'?': set(), '!': set(), '+': set()}
      words = []
      for word in line[2:].split(' '):
        if re.fullmatch(r'[?!+][A-Za-z]+', word):
          flags[word[0]].add(word[1:])
        else:
          words.append(word)
      needs, forbids, sets = (frozenset(flags[sign]) for sign in '?!+')
      phrase = Phrase(' '.join(words).strip(), needs, forbids, sets)
      rules[name].append(phrase)
    elif line.strip():
      name = line.strip().removesuffix(':')
      rules[name] = []
  return rules


class Teller:
  """A story while it is told: who is in it, what happened, who was named."""

  def __init__(self, rng: random.Random, rules: dict[str, list[Phrase]]):
    self.rng = rng
    self.rules = rules
    self.flags: set[str] = set()
    self.words: dict[str, str] = {}
    self.people: dict[str, Person] = {}
    self.paragraphs: list[list[str]] = [[]]
    # Keys of the people in this sentence and in the one before.
    self.now: list[str] = []
    self.before: list[str] = []
    self.used: set[Phrase] = set()

  def expand(self, text: str) -> str:
    """`text` with its alternatives, rules and words chosen."""
    while True:
      text, count = re.subn(
        r'\[([^\[\]]*)\]',
        lambda match: self.rng.choice(match[1].split('|')),
        text,
      )
      text, more = re.subn(
        r'\{=(\w+)\}', lambda match: self.choose(match[1]).text, text
      )
      text, some = re.subn(
        r'\{([a-z]\w*)\}', lambda match: self.words[match[1]], text
      )
      if not count + more + some:
        return text

  def choose(self, rule: str) -> Phrase:
    """A phrase of the rule that may be told now."""
    return self.rng.choice(
      [
        phrase
        for phrase in self.rules[rule]
        if phrase.needs <= self.flags
        and not phrase.forbids & self.flags
        and not ('F' in phrase.sets and 'F' in self.flags)
        and phrase not in self.used
      ]
    )

  def tell(self, event: str) -> None:
    """Tells an event in one of its ways."""
    phrase = self.choose(event)
    self.used.add(phrase)
    self.flags |= phrase.sets
    text = self.expand(phrase.text)
    parts = re.split(r'(\{[HFP](?:\.\w+)?\})', text)
    written = ''
    for part in parts:
      if part.startswith('{'):
        written += self.refer(*part[1:-1].partition('.')[::2])
      else:
        for end in re.finditer(r'[.!?]"? |[^.!?]+|.', part):
          if re.fullmatch(r'[.!?]"? ', end[0]):
            self.end_sentence()
          written += end[0]
    self.end_sentence()
    self.paragraphs[-1].append(written)

  def end_sentence(self) -> None:
    self.before, self.now = self.now, []

  def begin_paragraph(self) -> None:
    self.before, self.now = [], []
    self.paragraphs.append([])

  def refer(self, key: str, form: str) -> str:
    """A name, or a pronoun where it can mean no one else."""
    person = self.people[key]
    if form in ('kind', 'home'):
      return person.kind if form == 'kind' else SPECIES[person.kind]
    if form == 'intro':
      return self.introduce(key)
    alike = [
      k
      for k, p in self.people.items()
      if k != key and p.gender == person.gender
    ]
    recent = self.now if key in self.now else self.now + self.before
    clear = key in recent and not any(k in recent for k in alike)
    self.now.append(key)
    if form == 'himself' or form and clear:
      return PRONOUNS[person.gender][form]
    return person.name + ("'s" if form == 'his' else '')

  def introduce(self, key: str) -> str:
    """The first mention of a friend."""
    person = self.people[key]
    if 'forest' in self.flags:
      name = f'{person.name} the {person.kind}'
      words = self.rng.choice(['friend ', 'neighbor ', ''])
    else:
      name = person.name
      words = self.rng.choice(
        ['friend ', 'best friend ', 'neighbor ', 'cousin ', 'classmate ']
      )
    if words:
      words = f'{self.refer("H", "his")} {words}'
    self.now.append(key)
    return words + name

  def finish(self) -> str:
    """The text, with its capitals and articles."""
    return '\n\n'.join(
      mend(' '.join(paragraph)) for paragraph in self.paragraphs if paragraph
    )


def mend(text: str) -> str:
  """Capitals at the beginning of sentences, and "an" for "a"."""
  text = re.sub(r' +(?=[ .,!?]|$)', '', text.strip())
  text = re.sub(r'\b([Aa]) (?=[aeiouAEIOU](?!ne\b|ni|se))', r'\1n ', text)
  return re.sub(
    r'((?:^|[.!?] |[.]" |[!?]" (?="))"?)([a-z])',
    lambda match: match[1] + match[2].upper(),
    text,
  )


def cast(t: Teller, world: str, scheme: str) -> None:
  """Chooses who is in a story, and its words."""
  rng, pick = t.rng, t.rng.choice
  genders = [pick(['he', 'she'])]
  other = 'she' if genders[0] == 'he' else 'he'
  genders.append(other if rng.random() < 0.7 else genders[0])
  boys, girls = rng.sample(BOYS, 2), rng.sample(GIRLS, 2)
  kinds = rng.sample(list(SPECIES), 2)
  for i, key in enumerate('HF'):
    gender = genders[i]
    kind = 'boy' if gender == 'he' else 'girl'
    if world == 'forest':
      kind = kinds[i]
    name = boys[i] if gender == 'he' else girls[i]
    t.people[key] = Person(name, gender, kind)
  adults = ADULTS[world]
  names = list(adults)
  if scheme == 'visit' and world == 'child':
    names = list(VISITED)
  name = pick(names)
  t.people['P'] = Person(name, adults[name])
  fits = lambda rows: [row for row in rows if row[-1] in ('', world)]
  w = t.words
  w['x'], w['c'], w['l'] = (
    pick(THINGS[world]),
    pick(COLORS),
    pick(PLACES[world]),
  )
  if scheme == 'quarrel':
    w['x'] = pick([x for x in THINGS[world] if x in TOYS])
  if w['x'] in TOYS:
    t.flags.add('toy')
  w['food'], w['foodn'] = pick(FOODS)
  w['indoor'], w['fun'] = pick(INDOORS)
  w['m'], w['stuff'], w['fail'], w['fix'], w['done'] = pick(MADE)
  w['play'], w['played'] = pick(GAMES)
  w['careless'], w['z'] = pick(CARELESS), pick(FRAGILE)
  w['fruit'] = pick(FRUIT)
  w['owner'] = "{P}'s"
  w['flower'], w['cl'], w['big'] = pick(FLOWERS), pick(TRAILS), pick(HIDEOUTS)
  kinds = [person.kind for person in t.people.values()]
  w['y'] = pick([y for y in ANIMALS[world] if y not in kinds])
  w['how'] = {
    'lost': lambda: pick(['nest', 'bench', 'friend', 'dog']),
    'animal': lambda: pick(['stuck', 'cold', 'hungry', 'lost']),
    'visit': lambda: pick(['bridge', 'fog', 'tree']),
    'night': lambda: pick(['cat', 'branch', 'friend', 'mouse']),
  }.get(scheme, str)()
  if scheme == 'fear':
    w['fear'], w['how'], _ = pick(fits(FEARS))
  if scheme == 'learn':
    w['do'], w['oops'], w['tip'], w['l'], _ = pick(fits(LEARNT))


def write_story(rng: random.Random, rules: dict[str, list[Phrase]]) -> str:
  """A story of the right length in which nothing is said twice."""
  while True:
    scheme = rng.choice(list(SCHEMES))
    world = rng.choice(['child', 'child', 'forest'])
    if scheme in OF_CHILDREN:
      world = 'child'
    t = Teller(rng, rules)
    t.flags |= {world, *FLAGS.get(scheme, ())}
    cast(t, world, scheme)
    t.tell('open')
    for event in SCHEMES[scheme].split():
      if event == '|':
        t.begin_paragraph()
        continue
      if event.startswith('?') and rng.random() < 0.45:
        continue
      event = re.sub(r'\[(\w+)\]', lambda m, t=t: t.words[m[1]], event)
      t.tell(event.removeprefix('?'))
    text = t.finish()
    said = sentences(text)
    if SHORTEST <= len(text.split()) <= LONGEST and len(said) == len(set(said)):
      return text


def sentences(text: str) -> list[str]:
  """The sentences of a text; what is said and who says it are one."""
  return [
    sentence.strip()
    for paragraph in text.split('\n')
    for sentence in re.split(
      r'(?<=[.!?]) (?=["A-Z])|(?<=[.!?]") (?=["A-Z])', paragraph
    )
    if sentence.strip()
  ]


def make_stories(count: int, seed: int) -> list[str]:
  """`count` different stories."""
  rng = random.Random(seed)
  rules = read_phrases(PHRASES.read_text(encoding='utf-8'))
  stories: dict[str, None] = {}
  while len(stories) < count:
    stories[write_story(rng, rules)] = None
  return list(stories)


def to_line(story: str, rng: random.Random) -> str:
  """One line of JSON: a prompt, empty half of the time, and what follows."""
  cut = 0
  if rng.random() < 0.5:
    spaces = [match.start() for match in re.finditer(' ', story)]
    cut = spaces[rng.randrange(min(len(spaces), 40))]
  return json.dumps({'prompt': story[:cut], 'response': story[cut:]}) + '\n'


def write(path: pathlib.Path, content: bytes) -> None:
  """All of a file or nothing."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + '.tmp')
  part.write_bytes(content)
  os.replace(part, path)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--out', required=True, help='file of stories to write')
  parser.add_argument('--count', type=int, default=60_000)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--tokenizer',
    default='stories.model',
    help='its name, beside the stories; empty: none is trained',
  )
  parser.add_argument('--pieces', type=int, default=2048)
  given = parser.parse_args()
  stories = make_stories(given.count, given.seed)
  rng = random.Random(f'prompts {given.seed}')
  out = pathlib.Path(given.out)
  write(out, ''.join(to_line(story, rng) for story in stories).encode())
  words = {w for s in stories for w in re.findall("[a-z']+", s.lower())}
  print(f'{len(stories):,} stories, {len(words):,} different words in {out}')
  if given.tokenizer:
    lines = (x for story in stories[:20_000] for x in story.splitlines() if x)
    model = tokenizers.train(lines, given.pieces)
    write(out.with_name(given.tokenizer), model)


if __name__ == '__main__':
  main()
