"""RESULTS.md, made of the JSON files that the measurements wrote.

  python experiments/results.py            writes RESULTS.md
  python experiments/results.py --check    exits with 1 where it differs

Each section is one row of `SECTIONS`: title, what was measured, JSON file,
command, heads of the columns, and a function from the file's content to rows. A
number is written here only if it stands in a JSON file.
"""

from collections.abc import Callable
import json
import pathlib
import statistics
import sys
from typing import Any
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / 'experiments'

HEAD = """# Results

Every number here is written by `python experiments/results.py` from a JSON file
in `experiments/`, which has all digits; a test compares. The command beside
each table made that file. What is behind the numbers (data, conditions, limits,
plots) is in [experiments/README.md](experiments/README.md). Numbers without a
JSON file are in [BUILD.md](BUILD.md), beside their commands.

CPU results are of 2 cores of a virtual machine.
"""

TAIL = """## Not measured
* The released weights: they were not at hand. All results are of networks
  trained here, or of random weights with the released shapes.
* Training on a GPU, several GPUs, TPUs.
* On an H200: bf16, batches, long contexts, and the kernels of attention and of
  the vocabulary, with the code of the table above; fp8 not at all.
* The quality of fine-tuning, of LoRA and of fp8 on a large network.
* The estimates of time of `--mode=plan` against a real device.
"""


class Section(NamedTuple):
  """One table.

  Attributes:
    title: its heading.
    what: a sentence or two on what was measured.
    file: JSON, in `experiments/`.
    command: what wrote the file; None where the file says so itself.
    columns: their heads.
    rows: content of the file -> rows of cells.
  """

  title: str
  what: str
  file: str
  command: str | None
  columns: tuple[str, ...]
  rows: Callable[[Any], list[list[str]]]


def percent(x: float, digits: int = 1) -> str:
  return f'{100 * x:.{digits}f} %'


def gigabytes(x: float) -> str:
  return f'{x / 1e9:.1f} GB'


def milliseconds(x: float) -> str:
  return f'{1e3 * x:.1f} ms'


def shakespeare(content: dict) -> list[list[str]]:
  names = {
    'ar_bits_per_byte': 'left to right (prefill pass), bits per byte',
    'bzip2_9_bits_per_byte': '`bzip2 -9`, bits per byte',
    'xz_9e_bits_per_byte': '`xz -9e`, bits per byte',
    'gzip_9_bits_per_byte': '`gzip -9`, bits per byte',
    'denoise_loss_t0.1_corrupted_bits': (
      'denoising loss, t = 0.1, bits per token'
    ),
    'denoise_loss_t0.5_corrupted_bits': (
      'denoising loss, t = 0.5, bits per token'
    ),
    'denoise_loss_t0.9_corrupted_bits': (
      'denoising loss, t = 0.9, bits per token'
    ),
    'unigram_bits_per_token': 'unigram entropy, bits per token',
  }
  runs = [content[name]['numbers'] for name in ('demo', 'hour')]
  rows = [
    [text, *(f'{numbers[name]:.2f}' for numbers in runs)]
    for name, text in names.items()
  ]
  seconds = content['demo']['seconds_from_bare_clone_to_text']
  minutes = content['hour']['minutes_of_training_program']
  return [
    ['training steps', *(f'{numbers["step"]:,}' for numbers in runs)],
    ['time', f'{seconds} s, from bare clone to text', f'{minutes} min'],
    *rows,
  ]


def objectives(content: dict) -> list[list[str]]:
  def row(name, canvas, numbers):
    bound = '-'
    if 'nelbo_bits_per_byte' in numbers:
      error = numbers['nelbo_standard_error_bits_per_byte']
      bound = f'{numbers["nelbo_bits_per_byte"]:.3f} ± {error:.3f}'
    return [name, canvas, bound, f'{numbers["ar_bits_per_byte"]:.3f}']

  return [
    row('left to right alone', '-', content['ar']),
    *(
      row('block diffusion and left to right', length, numbers)
      for length, numbers in content['denoisers'].items()
    ),
  ]


def few_passes(content: dict) -> list[list[str]]:
  return [
    [
      record['strategy'],
      'yes' if record['self_conditioning'] else 'no',
      percent(record['solved']),
      f'{record["steps"]:.1f}',
    ]
    for record in content['records']
    if record['budget'] == content['sampler']['max_denoising_steps']
  ]


def sudoku(content: dict) -> list[list[str]]:
  most = content['sampler']['max_denoising_steps']
  budgets = [
    [f'most passes: {r["budget"]}', percent(r['solved']), f'{r["steps"]:.1f}']
    for r in content['denoising']['budgets']
    if r['budget'] in (1, 2, 5, 8, 16, 32) and r['budget'] < most
  ]
  rows = []
  for name, text in (('free', ''), ('pinned', ', givens pinned')):
    found = content['denoising'][name]
    seeds = len(found['records'])
    text = f'most passes: {most}{text} (seeds: {seeds})'
    solved, steps = found['solved'], found['steps']
    rows.append([text, percent(solved['mean']), f'{steps["mean"]:.1f}'])
  for name, text in (
    ('ar', 'left to right, same weights'),
    ('ar_alone', 'left to right, a network trained for it alone'),
  ):
    if name in content:
      found = content[name]
      rows.append([text, percent(found['solved']), f'{found["steps"]:.1f}'])
  return budgets + rows


def best_of(content: dict) -> list[list[str]]:
  return [
    [
      str(record['tries']),
      percent(record['solved']),
      str(record['unsure']),
      f'{record["steps"]:.1f}',
    ]
    for record in content['best_of']
    if record['tries'] in (1, 2, 5, 10, 20, 40)
  ]


def temperatures(content: dict) -> list[list[str]]:
  return [
    [
      f'{record["t_max"]} to {record["t_min"]}',
      percent(record['solved']),
      f'{record["steps"]:.1f}',
    ]
    for record in content['temperatures']
  ]


def speed(content: dict) -> list[list[str]]:
  rows = [
    [
      f'denoising step, {r["batch"]} x {r["context"]:,}',
      f'{r["step_seconds"]:.3f} s',
      f'{r["peer_step_seconds"]:.3f} s',
      f'{r["compiled_peer_step_seconds"]:.3f} s',
      f'{r["times_as_fast_as_peer"]:.1f}',
    ]
    for r in content['sampling']
  ]
  training = content['training']
  return [
    *rows,
    [
      'training step, 4 x 512 tokens',
      f'{training["step_seconds"]:.2f} s',
      f'{training["peer_step_seconds"]:.2f} s',
      '-',
      f'{training["times_as_fast_as_peer"]:.1f}',
    ],
  ]


def repeats(content: list) -> list[list[str]]:
  """By version of jax: least, median and most of 1 x 256 and of training."""
  rows = []
  for version in sorted({run['jax'] for run in content}):
    runs = [run for run in content if run['jax'] == version]
    sampling = [
      record['times_as_fast_as_peer']
      for run in runs
      for record in run['sampling']
      if (record['batch'], record['context']) == (1, 256)
    ]
    training = [run['training']['times_as_fast_as_peer'] for run in runs]
    for what, ratios in (
      ('denoising step, 1 x 256', sampling),
      ('training step', training),
    ):
      middle = statistics.median(ratios)
      spread = f'{min(ratios):.2f} to {max(ratios):.2f}'
      rows.append([version, what, str(len(ratios)), spread, f'{middle:.2f}'])
  return rows


def h200(content: dict) -> list[list[str]]:
  rows = []
  for bits in ('int4', 'int8'):
    (found,) = content[f'{bits}.json']['sampling']
    rows.append(
      [
        f'experts {bits}, linears bf16',
        milliseconds(found['step_seconds']),
        milliseconds(found['commit_seconds']),
        milliseconds(found['prefill_seconds']),
        f'{found["tokens_per_second"]:,.0f}',
        gigabytes(found['peak_bytes']),
      ]
    )
  return rows


def few_bits(content: dict) -> list[list[str]]:
  rows = [
    ['float32', '-', '-', '-', f'{content["float32"]["ar_nats_per_token"]:.3f}']
  ]
  for name, found in content.items():
    if isinstance(found, dict) and 'logits' in found:
      rows.append(
        [
          name,
          percent(found['matrices']),
          percent(found['logits']),
          percent(found['top1_agreement']),
          f'{found["ar_nats_per_token"]:.3f}',
        ]
      )
  return rows


def kills(content: dict) -> list[list[str]]:
  return [
    [
      str(record['processes']),
      str(record['steps']),
      str(record['kills']),
      'yes' if record['bit_equal'] else 'no',
    ]
    for record in content['killed']
  ]


def memory(content: dict) -> list[list[str]]:
  found = content['thousand_steps']['megabytes_after_steps']
  return [[steps, f'{megabytes} MB'] for steps, megabytes in found.items()]


def conversion(content: dict) -> list[list[str]]:
  return [
    [
      f'{content["tensors"]:,}',
      gigabytes(content['bytes']),
      gigabytes(content['largest_bytes']),
      gigabytes(content['peak_bytes']),
      f'{content["seconds"]:.0f} s',
    ]
  ]


def versions(content: dict) -> list[list[str]]:
  return [
    [
      version,
      'yes' if all(all(f.values()) for f in written(found)) else 'no',
      f'{max(found["largest difference from the newest"].values()):g}',
    ]
    for version, found in content.items()
  ]


def written(found: dict) -> list[dict]:
  return [found[name] for name in ('written', 'as it came', 'as trained here')]


def parity(content: dict) -> list[list[str]]:
  networks = content['differences'].values()
  return [
    [name, *(f'{network[name]:.1e}' for network in networks)]
    for name in next(iter(networks))
  ]


def plans(content: dict) -> list[list[str]]:
  return [
    [
      f'`{name}`',
      str(found['devices']),
      f'{gigabytes(found["peak_bytes"])} of {gigabytes(found["limit_bytes"])}',
      f'{found["flops"] / 1e12:,.2f} T',
      f'{found["compile_seconds"]:.0f} s',
      found['commit'],
    ]
    for name, found in content.items()
  ]


def exchange(content: dict) -> list[list[str]]:
  return [
    [
      str(row['devices']),
      f'{row["gather_times_as_fast"]:.2f}',
      percent(row['sent']),
    ]
    for row in content['rows']
  ]


PASSES = ('sampled with', 'puzzles solved', 'passes on average')
SPEED = (
  'batch x context',
  'this package',
  '`transformers`',
  '`transformers`, `torch.compile`',
  'times as fast as `transformers`',
)
BESIDE = (
  '`configs/reference.py`, random weights, float32, beside `transformers` with '
  'the same weights. Medians, the programs in turns.'
)

SECTIONS = (
  Section(
    'Shakespeare',
    '`configs/tiny.py`, 2.4 M parameters, on three plays that it has not seen; '
    '`make demo` beside 9,000 steps.',
    'shakespeare/results.json',
    'python -m diffusiongemma.main --mode=evaluate --format=json '
    '--workdir=runs/tiny',
    ('', '`make demo`', 'an hour'),
    shakespeare,
  ),
  Section(
    'Block diffusion beside left to right',
    'The same network, 500 steps each, bits per byte of the held-out plays. '
    'Denoising is an upper bound (NELBO) with its standard error; left to '
    'right is exact.',
    'shakespeare/comparison.json',
    None,
    ('trained to write', 'canvas', 'denoising', 'left to right, same weights'),
    objectives,
  ),
  Section(
    'Sampling strategies',
    '1,000 unseen 6x6 Sudoku puzzles, at most 16 passes, a network of '
    '`configs/sudoku.py` after 2,500 steps.',
    'sampling_quality/results.json',
    'python -m experiments.sampling_quality.measure --workdir=runs/sudoku '
    '--puzzles=runs/sudoku6/heldout.jsonl',
    ('strategy', 'self-conditioning', *PASSES[1:]),
    few_passes,
  ),
  Section(
    'Sudoku, 6x6',
    '1,000 unseen puzzles, `configs/sudoku.py`, 6,000 steps.',
    'sudoku/6x6.json',
    None,
    PASSES,
    sudoku,
  ),
  Section(
    'Sudoku, 6x6: the network that ships',
    '1,000 unseen puzzles, `sudoku`: 8 bits, 2,500 steps.',
    'sudoku/shipped.json',
    None,
    PASSES,
    sudoku,
  ),
  Section(
    'Sudoku, 6x6: temperature',
    '1,000 other puzzles, on which the temperature was chosen.',
    'sudoku/temperatures_6x6.json',
    None,
    ('temperature', *PASSES[1:]),
    temperatures,
  ),
  Section(
    'Sudoku, 9x9: one answer',
    '1,000 unseen puzzles, `configs/sudoku9.py`, 14,000 steps.',
    'sudoku/9x9.json',
    None,
    PASSES,
    sudoku,
  ),
  Section(
    'Sudoku, 9x9: several answers',
    'The same network, asked again while it is not sure of its answer.',
    'sudoku/best_of_9x9.json',
    None,
    ('answers at most', 'puzzles solved', 'not sure', 'passes on average'),
    best_of,
  ),
  Section(
    'Sudoku, 9x9: temperature',
    '100 other puzzles, the network after 5,000 steps.',
    'sudoku/temperatures_9x9.json',
    None,
    ('temperature', *PASSES[1:]),
    temperatures,
  ),
  Section('Speed on a CPU', BESIDE, 'benchmarks/cpu.json', None, SPEED, speed),
  Section(
    'Speed on a CPU, repeated',
    'The other runs of the same day, times as fast as `transformers` and as '
    'PyTorch.',
    'benchmarks/cpu_repeats.json',
    'python -m diffusiongemma.main --mode=benchmark '
    '--config=configs/reference.py --grid=1x256 --format=json',
    ('jax', 'what', 'runs', 'least to most', 'median'),
    repeats,
  ),
  Section(
    'Speed on another CPU (Intel Xeon), older code',
    BESIDE,
    'benchmarks/cpu_xeon.json',
    None,
    SPEED,
    speed,
  ),
  Section(
    'Speed on another CPU (AMD EPYC), older code',
    f'{BESIDE} Tests ran beside the training step.',
    'benchmarks/cpu_amd.json',
    None,
    SPEED,
    speed,
  ),
  Section(
    'Speed on an H200',
    'The shapes of the 26B-A4B, random weights, batch 1, a context of 1,024; '
    'tokens/s of 16 steps and a commit. The aims are 2,500 (int4) and 1,700 '
    '(int8).',
    'benchmarks/h200_hopper.json',
    'sh experiments/benchmarks/gpu.sh FOLDER',
    ('', 'denoising step', 'commit', 'prompt', 'tokens/s', 'peak memory'),
    h200,
  ),
  Section(
    'Quantisation',
    '`configs/tiny.py` after 300 steps: relative error of the quantised '
    'matrices and of the logits, how often the most probable token is the '
    'same, and the loss from left to right.',
    'quantization/results.json',
    'python -m experiments.quantization.measure --workdir=runs/tiny '
    '--out=experiments/quantization/results.json',
    ('', 'matrices', 'logits', 'same top-1', 'nats per token'),
    few_bits,
  ),
  Section(
    'Killed runs',
    'Runs that were killed by SIGKILL at random moments and started again, '
    'beside one that was not: parameters, optimiser state and place in the '
    'data.',
    'reliability/results.json',
    None,
    ('processes', 'steps', 'kills', 'equal to the bit'),
    kills,
  ),
  Section(
    'Memory of a long run',
    'Resident memory of a training process.',
    'reliability/results.json',
    None,
    ('after steps', 'memory'),
    memory,
  ),
  Section(
    'Conversion of the released shapes',
    'A Hugging Face folder with the names and shapes of the 26B-A4B, of zeros, '
    'made a run.',
    'conversion/results.json',
    'python experiments/conversion/convert_zeros.py '
    '--config=configs/26b_a4b.py --folder=/tmp/zeros '
    '--output=experiments/conversion/results.json',
    ('tensors', 'size', 'largest tensor', 'peak memory', 'time'),
    conversion,
  ),
  Section(
    'Versions of `transformers`',
    'Small random networks, as each version writes them, converted and '
    'exported: whether it computes the same to the bit from what `export` '
    'wrote.',
    'conversion/transformers_versions.json',
    'python experiments/conversion/transformers_versions.py '
    '--fixtures=tests/reference/configs '
    '--output=experiments/conversion/transformers_versions.json',
    ('version', 'equal to the bit', 'largest difference from the newest'),
    versions,
  ),
  Section(
    'Differences from `transformers`',
    'Three small networks in which every tensor is random; largest difference '
    'as a part of the largest value, float32 unless said. BUILD.md describes '
    'the networks and the rows.',
    'parity/results.json',
    'python tests/parity.py --output=experiments/parity/results.json',
    ('quantity', 'short window', 'two global heads', 'no grouping'),
    parity,
  ),
  Section(
    'Compiled ahead of time for other devices',
    'Peak memory of each device and FLOPs of one step. Nothing was run. '
    'BUILD.md describes the plans.',
    'scale/results.json',
    'python -m experiments.scale.plans --out=experiments/scale/results.json '
    'NAME',
    ('plan', 'devices', 'peak memory', 'FLOPs', 'compiled in', 'commit'),
    plans,
  ),
  Section(
    'Experts on several devices: gather beside all-to-all',
    '8 of 128 experts, 1,024 tokens, CPU devices.',
    'scale/exchange.json',
    None,
    (
      'devices along `expert`',
      'gather, times as fast',
      'tokens that another device needs',
    ),
    exchange,
  ),
)


def measured_with(content: Any) -> str:
  """Machine, versions, commit and date, as far as the file says."""
  if not isinstance(content, dict):
    return ''
  content = {**content.get('versions', {}), **content}
  facts = [content[k] for k in ('machine', 'date') if k in content]
  if content.get('device', 'cpu') not in ('cpu', *facts):
    facts.insert(0, content['device'])
  for name in ('jax', 'commit'):
    if name in content:
      facts.append(f'{name} {content[name].split()[0]}')
  return ', '.join(facts)


def render(section: Section) -> str:
  """The section in Markdown."""
  content = json.loads((FOLDER / section.file).read_text())
  command = section.command or content['command']
  lines = ['| ' + ' | '.join(section.columns) + ' |']
  lines.append('|' + '---|' * len(section.columns))
  lines += ['| ' + ' | '.join(row) + ' |' for row in section.rows(content)]
  facts = measured_with(content)
  return '\n'.join(
    [
      f'## {section.title}',
      section.what,
      '',
      *lines,
      '',
      f'`{command}`  ',
      f'`experiments/{section.file}`{": " + facts if facts else ""}',
      '',
    ]
  )


def main() -> int:
  text = '\n'.join([HEAD, *map(render, SECTIONS), TAIL])
  path = ROOT / 'RESULTS.md'
  if '--check' in sys.argv[1:]:
    if path.read_text() == text:
      return 0
    print('RESULTS.md is not what the JSON files say:', file=sys.stderr)
    print('  python experiments/results.py', file=sys.stderr)
    return 1
  path.write_text(text)
  return 0


if __name__ == '__main__':
  sys.exit(main())
