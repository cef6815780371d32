"""Fine-tune a network on chats and talk to it.

Each line of a JSONL file is one conversation: `{"messages": [...]}`. What the
assistant says is learnt, with the token that ends its turn.

Command:  python examples/finetune_on_chats.py
  With RUN=FOLDER that run, or Hugging Face folder, is fine-tuned instead; its
  tokenizer must know turns. STEPS=FEWER trains less than 600 steps.
Expected: four answers, most of which the small network has learnt by heart.
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
root = pathlib.Path(dg.__file__).parents[1]


def command(*arguments):
  """Runs the package's command line and shows the last lines it prints."""
  done = subprocess.run(
    [sys.executable, '-m', 'diffusiongemma.main', *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  print('\n'.join(done.stdout.splitlines()[-6:]))
  assert done.returncode == 0, done.stdout


# %% [markdown]
# The conversations. `{"prompt": ..., "response": ...}` and the forms of
# ShareGPT, Alpaca, TRL and OpenAI are read too.

# %%
ANSWERS = {
  'Who loves Juliet?': 'Romeo does.',
  'Who is king of Scotland?': 'Macbeth is.',
  'Who made the storm?': 'Prospero did.',
  'Who is the prince of Denmark?': 'Hamlet is.',
}


def chat(question, answer):
  return [
    {'role': 'user', 'content': question},
    {'role': 'assistant', 'content': answer},
  ]


chats = folder / 'chats.jsonl'
lines = [json.dumps({'messages': chat(*pair)}) for pair in ANSWERS.items()]
_ = chats.write_text('\n'.join(lines * 50))  # Long enough to shuffle well.

# %% [markdown]
# Fine-tuning: `init_from` names a run or a Hugging Face folder, whose network,
# sampler, tokenizer and chat template are used. For adapters instead of all
# weights add `--config.lora.rank=16`.

# %%
tuned = folder / 'tuned'
settings = [
  f'--config={root / "examples" / "small.py"}',
  f'--workdir={tuned}',
  f'--config.data.path={chats}',
  f'--config.data.heldout_path={chats}',
  f'--config.train.steps={os.environ.get("STEPS", "600")}',
  '--config.train.log_every=200',
]

# %% [markdown]
# Without `RUN` there is nothing to start from: the small network learns the
# chats from scratch, with a tokenizer that is trained on them. Since they are
# chats, it has Gemma's tokens for turns.

# %%
if os.environ.get('RUN'):
  settings += [f'--config.train.init_from={os.environ["RUN"]}']
else:
  settings += [
    '--config.data.tokenizer=new:320',
    '--config.model.vocab_size=320',
    '--config.diffusion.entropy_bound=0.1',
  ]
command(*settings)

# %%
run = dg.load(tuned)
for question, answer in ANSWERS.items():
  reply = dg.chat(run, chat(question, answer)[:1], max_new_tokens=16)
  print(question, '->', reply.text, f'(learnt: {answer})')
