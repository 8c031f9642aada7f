"""A web page on a trained model: `python -m scl_jax.demo --checkpoint=…`.

`service` answers and knows nothing of the page, `html` writes small pieces of it, `page` puts it together with Gradio
(`pip install "scl_jax[demo]"`), `__main__` is the command.
"""
