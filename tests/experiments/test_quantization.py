"""What few bits cost: what is compared after each layer."""

import jax
import jax.numpy as jnp
import micro_config
import numpy as np
import pytest

from diffusiongemma.model import denoiser
from experiments.quantization import measure


def test_a_folder_without_a_run_is_one_message(tmp_path, monkeypatch):
  out = tmp_path / 'out.json'
  flags = [f'--workdir={tmp_path}', f'--out={out}']
  monkeypatch.setattr('sys.argv', ['measure', *flags])
  with pytest.raises(SystemExit, match='holds no run'):
    measure.main()
  assert not out.exists()


def test_hidden_states_are_those_after_each_layer():
  config = micro_config.get_config()
  model = denoiser.Denoiser(config.model)
  params = denoiser.init_params(model, jax.random.key(0))
  tokens_BS = jax.random.randint(jax.random.key(1), (2, 16), 0, 100)
  length_B, canvas_BL = jnp.array([16, 16]), tokens_BS[:, :8]
  seen, logits_BLV = measure.look(
    config, params, tokens_BS, length_B, canvas_BL
  )
  assert len(seen) == len(config.model.attention_pattern)
  assert logits_BLV.shape == (2, 8, config.model.vocab_size)

  @jax.jit
  def normed(params, x_BSD):
    """The last of them as the network gives it, and as it would be of x."""
    given = (tokens_BS, length_B)
    h_BSD = model.apply({'params': params}, *given, method='prefill')[0]
    return h_BSD, model.bind({'params': params}).final_norm(x_BSD)

  whole, last = normed(params, seen[-1])
  np.testing.assert_allclose(whole, last, rtol=1e-5, atol=1e-5)
