"""Both ways of bringing tokens to their experts give the same."""

import json

import many_devices

MEASURE = """
import json

import numpy as np

from experiments.scale import exchange

exchange.E, exchange.k, exchange.D, exchange.F = 8, 3, 16, 4
exchange.TOKENS, exchange.REPEATS = 32, 1
layer = exchange.make_layer(np.random.default_rng(0))
print(json.dumps(exchange.measure(4, layer)))
"""


def test_ways_agree_and_are_counted():
  """`measure` compares the results itself."""
  found = json.loads(many_devices.run(MEASURE, devices=4).splitlines()[-1])
  assert set(found['bytes']['all_to_all']) == {'all-to-all'}
  assert set(found['bytes']['gather']) == {'all-gather', 'reduce-scatter'}
  # Of three choices, few fall on the same of four devices.
  assert 0.4 < found['sent'] < 0.75
