"""Packages and extras of fastimagen. constraints.txt pins the versions that are tested together."""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "fastimagen/__init__.py").read_text())[1]

PACKAGES = [
    "commands",
    "data",
    "data.packing",
    "data.remote",
    "demo",
    "diffusion",
    "evaluation",
    "interop",
    "networks",
    "ops",
    "sampling",
    "text",
    "train",
]

TEXT = ["transformers>=5.0", "sentencepiece>=0.2", "protobuf"]
KERNELS = ["triton>=3.6; platform_system == 'Linux'"]
DATA = ["webdataset>=1.0", "pyarrow>=18", "urllib3>=2.6", "fsspec>=2025.3"]
HUB = ["huggingface_hub>=1.0"]
TRAIN = [*TEXT, *KERNELS, *DATA, "deepspeed>=0.19.8", "tensorboard", "tqdm", "psutil"]
PLOT = ["matplotlib>=3.9"]
DEMO = [*TEXT, "gradio>=6.0"]
DOCS = [*PLOT, "mkdocs-material>=9.7"]  # matplotlib draws the figures of the tutorial


class BuildWithStartingFiles(build_py):
    """Copies ds.json and launch/ into a wheel: fastimagen/starting_files.py finds them there."""

    def run(self):
        super().run()
        if self.editable_mode:
            return  # the clone has them
        target = Path(self.build_lib) / "fastimagen/_starting_files"
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build
        shutil.copytree(ROOT / "launch", target / "launch", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "ds.json", target)


def long_description():
    """README.md without images, and without links to files: neither exists beside an installed wheel."""
    text = re.sub(r"^!\[[^\]]*\]\([^)]*\)\n+", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\1", text)


setup(
    name="fastimagen",
    version=VERSION,
    description="Train Imagen, the cascaded text-to-image diffusion model, on CUDA clusters, and sample from it",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["diffusion", "text-to-image", "Imagen", "DeepSpeed", "Triton", "PyTorch"],
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
    package_data={"fastimagen": ["py.typed", "__init__.pyi"]},
    include_package_data=False,  # MANIFEST.in is for the source distribution
    cmdclass={"build_py": BuildWithStartingFiles},
    install_requires=["torch>=2.11", "safetensors>=0.5", "numpy>=1.26", "einops>=0.8", "pydantic>=2.10", "pillow>=11"],
    extras_require={
        "text": TEXT,
        "kernels": KERNELS,
        "data": DATA,
        "hub": HUB,
        "train": TRAIN,
        "xformers": ["xformers"],
        "demo": DEMO,
        "plot": PLOT,
        "test": [
            *TRAIN,
            *DEMO,
            *HUB,
            *PLOT,
            "fonttools",  # to make a font
            "diffusers",  # to compare DeepFloyd IF with
            "peft",  # with which diffusers loads adapters
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "hypothesis",
            "packaging",
            "pyyaml",
            "playwright",
            "axe-playwright-python",
        ],
        "docs": DOCS,
        "dev": ["ruff", "mypy", "build", "twine"],
    },
    entry_points={"console_scripts": ["fastimagen = fastimagen.cli:main"]},
)
