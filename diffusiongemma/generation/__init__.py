"""From prompts to text: where the network and the sampler meet."""
