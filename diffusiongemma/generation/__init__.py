"""From prompts to text: combines the network and the sampler."""
