"""The documentation site: the Markdown pages of the project, its notebooks with
the outputs they have, and the docstrings.

  make docs       writes docs/_build/html; a warning, such as a broken link
                  between pages, is an error
"""

import pathlib
import re

import diffusiongemma

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = ('README', 'BUILD', 'RESULTS', 'CONTRIBUTING', 'CHANGELOG')

project = 'DiffusionGemma in JAX'
version = release = diffusiongemma.__version__
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
html_theme = 'furo'
html_title = project
html_show_copyright = False
exclude_patterns = ['_build']
nb_execution_mode = 'off'
myst_heading_anchors = 3
autodoc_typehints = 'signature'
autodoc_member_order = 'bysource'
napoleon_use_ivar = True
# Docstrings have code in single backticks.
default_role = 'code'
smartquotes = False


def _to_page(match: re.Match[str]) -> str:
  """A link of a page in the repository, as one of the site: to a page that is
  there, else only its text."""
  text, target = match.groups()
  path, hash_, anchor = target.partition('#')
  if re.match(r'[a-z]+://', target) or not path:
    return match[0]
  stem = pathlib.Path(path).stem
  if path.endswith('.md') and '/' not in path and stem in PAGES:
    return f'[{text}]({stem.lower()}.md{hash_}{anchor})'
  if path.rstrip('/') == 'examples':
    return f'[{text}](../examples.md)'
  return text


def _write_pages(folder: pathlib.Path) -> None:
  """Copies pages and notebooks of the repository to where Sphinx reads them."""
  folder.mkdir(exist_ok=True)
  for name in PAGES:
    text = (ROOT / f'{name}.md').read_text()
    text = re.sub(r'!\[([^\]]*)\]\(([^)\s]+)\)', r'![\1](../../\2)', text)
    text = re.sub(r'(?<!!)\[([^\]]+)\]\(([^)\s]+)\)', _to_page, text)
    (folder / f'{name.lower()}.md').write_text(text)
  for path in (ROOT / 'examples').glob('*.ipynb'):
    (folder / path.name).write_bytes(path.read_bytes())


_write_pages(ROOT / 'docs' / 'pages')
