"""Leave-one-out denoising: a token is told from all of the canvas but itself.

It is for likelihoods (`diffusion/likelihood.py`): `ce`, with the evidence of
each token handed to the network.
"""

import functools

from diffusiongemma.training.objectives import ce

DENOISES, LEAVES_ONE_OUT = True, True
draw = ce.draw
loss = functools.partial(ce.loss, leave_one_out=LEAVES_ONE_OUT)
