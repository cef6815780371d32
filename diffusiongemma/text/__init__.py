"""Between text and tokens, and between the sampler and a person."""
