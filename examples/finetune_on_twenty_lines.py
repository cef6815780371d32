"""Fine-tune on twenty lines, on a laptop.

The network `stories` knows no pirates. Adapters are trained on twenty lines
about one, over its weights in 8 bits, which stay as they are (QLoRA).

Command:  python examples/finetune_on_twenty_lines.py
  STEPS=FEWER trains less than 150 steps.
Expected: before, what it learnt; afterwards, stories of Captain Bess.
"""

# %%
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import diffusiongemma as dg

folder = pathlib.Path(tempfile.mkdtemp())
PROMPT = 'Once upon a time, there was a pirate'

# %% [markdown]
# A line is a prompt and a response; any text would do.

# %%
SHIPS = ('red boat', 'blue boat', 'old ship', 'little ship', 'white boat')
FINDS = ('silver bell', 'golden ring', 'shell', 'brown basket')
stories = [
  {
    'prompt': PROMPT,
    'response': f' named Captain Bess. She had a {ship} and a green parrot. '
    f'One day, Captain Bess found a {find} on the beach. '
    f'"Look at this!" said the parrot. They sang all the way home.',
  }
  for ship in SHIPS
  for find in FINDS
]
lines = folder / 'pirates.jsonl'
_ = lines.write_text('\n'.join(map(json.dumps, stories)))
print(len(stories), 'lines')

# %% [markdown]
# What the network says now:

# %%
run = dg.load('stories')
before = dg.generate(run, PROMPT, max_new_tokens=64)
print(PROMPT + before.text)

# %% [markdown]
# One command trains: `init_from` is the network, `lora.rank` makes it train
# adapters alone.

# %%
tuned = folder / 'pirates'
done = subprocess.run(
  [
    *(sys.executable, '-m', 'diffusiongemma.main', '--config=lora'),
    f'--workdir={tuned}',
    '--config.train.init_from=stories',
    '--config.lora.rank=8',
    '--config.lora.targets=*/attention/*,*/shared_mlp/*,*/experts/*',
    f'--config.data.path={lines}',
    f'--config.data.heldout_path={lines}',
    '--config.data.sequence_length=112',
    '--config.data.batch_size=4',
    '--config.optimizer.peak_learning_rate=1e-2',
    '--config.optimizer.warmup_steps=10',
    f'--config.train.steps={os.environ.get("STEPS", "150")}',
    '--config.train.sample_prompt=',
    '--config.train.log_every=50',
    '--config.train.evaluate_batches=1',
  ],
  stdout=subprocess.PIPE,
  stderr=subprocess.STDOUT,
  text=True,
  check=False,
)
print('\n'.join(done.stdout.splitlines()[-6:]))
assert done.returncode == 0, done.stdout

# %% [markdown]
# The adapters are a run of their own, of a few hundred kilobytes; loading it
# loads the network too.

# %%
after = dg.generate(dg.load(tuned), PROMPT, max_new_tokens=64)
print(PROMPT + after.text)
