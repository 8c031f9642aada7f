"""How fast training, the input pipeline and retrieval are: `python -m scl_jax.benchmark {step,input,retrieval}`."""
