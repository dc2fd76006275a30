"""Packages and extras of fastimagen. constraints.txt pins the versions that are tested together."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "fastimagen/__init__.py").read_text())[1]

PACKAGES = ["commands", "data", "diffusion", "evaluation", "interop", "networks", "ops", "sampling", "text", "train"]

TEXT = ["transformers>=5.0", "sentencepiece>=0.2", "protobuf"]
KERNELS = ["triton>=3.6; platform_system == 'Linux'"]
DATA = ["webdataset>=1.0"]
TRAIN = [*TEXT, *KERNELS, *DATA, "deepspeed>=0.19.8", "tensorboard", "tqdm", "psutil"]
DEMO = [*TEXT, "gradio>=6.0"]

setup(
    name="fastimagen",
    version=VERSION,
    description="Train Imagen, the cascaded text-to-image diffusion model, on CUDA clusters, and sample from it",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    # Named explicitly: find_packages() would also install tests, launch and benchmarks. kernels/ has no __init__.py and
    # installs as fastimagen_kernels, because Hugging Face publishes a package called `kernels`.
    packages=["fastimagen", *(f"fastimagen.{name}" for name in PACKAGES), "fastimagen_kernels"],
    package_dir={"fastimagen_kernels": "kernels"},
    package_data={"fastimagen": ["py.typed"]},
    install_requires=["torch>=2.11", "safetensors>=0.5", "numpy>=1.26", "einops>=0.8", "pydantic>=2.10", "pillow>=11"],
    extras_require={
        "text": TEXT,
        "kernels": KERNELS,
        "data": DATA,
        "train": TRAIN,
        "xformers": ["xformers"],
        "demo": DEMO,
        "test": [*TRAIN, *DEMO, "pytest", "pytest-benchmark", "hypothesis", "packaging", "pyyaml"],
        "dev": ["ruff", "mypy"],
    },
    entry_points={"console_scripts": ["fastimagen = fastimagen.cli:main"]},
)
