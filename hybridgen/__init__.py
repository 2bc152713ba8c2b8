"""hybridgen: image generators that join autoregressive planning with diffusion rendering, in JAX."""

__version__ = "0.1.0"
