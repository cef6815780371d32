"""Makes a notebook of each example, with the outputs of running it.

  pip install '.[docs]'
  python examples/make_notebooks.py              runs them all
  python examples/make_notebooks.py own_mesh     runs one
  python examples/make_notebooks.py --check      compares text and code alone

A script is in the percent format of jupytext: `# %%` begins code and
`# %% [markdown]` text. Its docstring is the first text.
"""

import ast
import pathlib
import re
import sys

import jupytext
import nbformat

FOLDER = pathlib.Path(__file__).resolve().parent
NAMES = (
  'solve_sudoku',
  'what_diffusion_does',
  'load_and_write',
  'own_denoiser_and_strategy',
  'finetune_on_twenty_lines',
  'finetune_on_chats',
  'own_training_loop',
  'own_mesh',
)


def to_notebook(name: str) -> nbformat.NotebookNode:
  """The notebook of a script, without outputs."""
  script = (FOLDER / f'{name}.py').read_text()
  _, docstring, body = script.split('"""', 2)
  title, _, text = ast.literal_eval(f'"""{docstring}"""').partition('\n')
  text = re.sub(r'(?m)^(Command|Expected):', r'**\1:**', text.strip())
  first = nbformat.v4.new_markdown_cell(f'# {title.rstrip(".")}\n\n{text}')
  cells = jupytext.reads(body.lstrip(), fmt='py:percent').cells
  notebook = nbformat.v4.new_notebook(cells=[first, *cells])
  for number, cell in enumerate(notebook.cells):
    cell.id, cell.metadata = f'{name}-{number}'[-64:], {}
  notebook.metadata['kernelspec'] = {
    'display_name': 'Python 3',
    'language': 'python',
    'name': 'python3',
  }
  return notebook


def execute(notebook: nbformat.NotebookNode) -> None:
  """Runs the cells and adds what they show, except for standard error."""
  import nbclient  # Only here: a comparison needs no kernel.

  where = {'metadata': {'path': str(FOLDER)}}
  nbclient.NotebookClient(
    notebook, resources=where, record_timing=False
  ).execute()
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']


def same_cells(name: str) -> bool:
  """Whether the notebook has the text and the code of the script."""
  there = nbformat.read(FOLDER / f'{name}.ipynb', nbformat.NO_CONVERT)
  cells = [
    [(c.cell_type, c.source) for c in n.cells]
    for n in (there, to_notebook(name))
  ]
  return cells[0] == cells[1]


def main(arguments: list[str]) -> int:
  if arguments == ['--check']:
    others = [name for name in NAMES if not same_cells(name)]
    for name in others:
      print(f'{name}.ipynb differs: python examples/make_notebooks.py {name}')
    return 1 if others else 0
  for name in arguments or NAMES:
    notebook = to_notebook(name)
    execute(notebook)
    nbformat.write(notebook, FOLDER / f'{name}.ipynb')
    print(f'{name}.ipynb')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
