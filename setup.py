"""Package definition. `make train` and `make test` install from requirements/*.txt instead,
which pin every version; the ranges here are what the library itself can live with."""

from setuptools import find_packages, setup

BASE = [
    "jax>=0.10,<0.12",
    "flax>=0.12",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.30",
    "grain>=0.2.15",
    "gin-config>=0.5",
    "absl-py>=2.0",
    "etils[epath]>=1.9",
    "numpy>=1.26",
    "sentencepiece>=0.2.3",
    "tokenizers>=0.21",
    "safetensors>=0.4",
    "rich>=13.0",
    "scikit-learn>=1.4",
    "matplotlib>=3.8",
    "tensorboardX>=2.6",
]
TENSORFLOW = ["tensorflow-datasets>=4.9.7", "seqio>=0.0.19", "tensorflow", "tensorflow-text"]

setup(
    name="t5like",
    version="0.1.0",
    description="Every way to pretrain a language model, pluggable, in JAX and Flax",
    python_requires=">=3.11,<3.14",
    packages=find_packages(
        include=["t5like*", "objectives*", "kernels*", "launch*", "gin_configs*"]
    ),
    package_data={"gin_configs": ["**/*.gin"], "launch.compiling": ["*.textproto"]},
    install_requires=BASE,
    extras_require={
        "all": TENSORFLOW,
        "test": TENSORFLOW + ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.6"],
        "tpu": ["jax[tpu]"],
        "gcs": ["gcsfs>=2025.9"],
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
    },
)
