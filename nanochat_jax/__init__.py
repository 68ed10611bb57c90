"""nanochat_jax: SFT and RL of nanochat models in JAX."""
