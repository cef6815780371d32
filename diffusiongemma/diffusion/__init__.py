"""The discrete diffusion process; it never imports the network."""
