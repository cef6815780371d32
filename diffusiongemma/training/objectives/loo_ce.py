"""Leave-one-out denoising: each token is predicted from the rest of the canvas.

It is for likelihoods (`diffusion/likelihood.py`): `ce`, with the evidence of
each token given to the loss.
"""

import functools

from diffusiongemma.training.objectives import ce

DENOISES, LEAVES_ONE_OUT = True, True
draw = ce.draw
loss = functools.partial(ce.loss, leave_one_out=LEAVES_ONE_OUT)
