"""Makes a notebook of each example, with the outputs of running it.

  python examples/make_notebooks.py              runs them all
  python examples/make_notebooks.py own_mesh     runs one
  python examples/make_notebooks.py --check      compares code alone

A script is divided at its lines `# %%`, code, and `# %% [markdown]`, comments
that become text; its docstring is the first text. Outputs are what the cells
print. Nothing but Python is needed; the notebooks open in Jupyter.
"""

import contextlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

FOLDER = pathlib.Path(__file__).resolve().parent
NAMES = (
  'load_and_write',
  'own_denoiser_and_strategy',
  'own_training_loop',
  'finetune_on_chats',
  'own_mesh',
)
MOST_CHARACTERS = 4000  # Of an output.


def to_cells(script: str) -> list[tuple[str, str]]:
  """[('markdown' or 'code', text), ...] of a script."""
  _, docstring, rest = script.split('"""', 2)
  title, _, text = docstring.partition('\n')
  command = re.sub(r'(?m)^(Command|Expected):', r'**\1:**', text.strip())
  cells = [('markdown', f'# {title.rstrip(".")}\n\n{command}')]
  for mark, body in re.findall(
    r'(?ms)^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)', rest
  ):
    body = body.strip('\n')
    if mark:
      cells.append(('markdown', re.sub(r'(?m)^# ?', '', body)))
    else:
      cells.append(('code', body))
  return cells


def run(name: str) -> list[str]:
  """What each code cell prints, run one after the other in one process."""
  os.chdir(FOLDER)
  sys.path.insert(0, str(FOLDER))
  variables = {'__name__': '__main__'}
  outputs = []
  for kind, text in to_cells(read(name)):
    if kind == 'code':
      printed = io.StringIO()
      with contextlib.redirect_stdout(printed):
        exec(compile(text, f'{name}.py', 'exec'), variables)
      outputs.append(printed.getvalue())
  return outputs


def to_notebook(name: str, outputs: list[str]) -> dict[str, Any]:
  """The notebook, format 4.5, of a script and what its cells print."""
  remaining, cells = list(outputs), []
  for number, (kind, text) in enumerate(to_cells(read(name))):
    cell: dict[str, Any] = {
      'cell_type': kind,
      'id': f'{name[:40]}-{number}',
      'metadata': {},
      'source': text.splitlines(keepends=True),
    }
    if kind == 'code':
      printed = remaining.pop(0)[-MOST_CHARACTERS:]
      stream = {
        'name': 'stdout',
        'output_type': 'stream',
        'text': printed.splitlines(keepends=True),
      }
      cell['execution_count'] = len(outputs) - len(remaining)
      cell['outputs'] = [stream] if printed else []
    cells.append(cell)
  kernel = {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}
  return {
    'cells': cells,
    'metadata': {
      'kernelspec': kernel,
      'language_info': {'name': 'python'},
    },
    'nbformat': 4,
    'nbformat_minor': 5,
  }


def read(name: str) -> str:
  return (FOLDER / f'{name}.py').read_text()


def same_cells(name: str) -> bool:
  """Whether the notebook has the text and the code of the script."""
  notebook = json.loads((FOLDER / f'{name}.ipynb').read_text())
  there = [(c['cell_type'], ''.join(c['source'])) for c in notebook['cells']]
  return there == to_cells(read(name))


def main(arguments: list[str]) -> int:
  if arguments == ['--check']:
    others = [name for name in NAMES if not same_cells(name)]
    for name in others:
      print(f'{name}.ipynb differs: python examples/make_notebooks.py {name}')
    return 1 if others else 0
  if len(arguments) == 2 and arguments[0] == '--run':
    print(json.dumps(run(arguments[1])))
    return 0
  for name in arguments or NAMES:
    # A process each: the mesh wants devices of its own.
    done = subprocess.run(
      [sys.executable, __file__, '--run', name],
      stdout=subprocess.PIPE,
      text=True,
      check=True,
    )
    notebook = to_notebook(name, json.loads(done.stdout))
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + '\n'
    (FOLDER / f'{name}.ipynb').write_text(text)
    print(f'{name}.ipynb')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
