"""The packages of the distribution: `hybridgen`, and the folder `configs` as `hybridgen.configs`."""

from setuptools import find_namespace_packages, find_packages, setup

CONFIGS = ["hybridgen.configs", *(f"hybridgen.configs.{name}" for name in find_namespace_packages("configs"))]

setup(
    packages=[*find_packages(include=["hybridgen*"]), *CONFIGS],
    package_dir={"hybridgen.configs": "configs"},
    package_data={"hybridgen": ["py.typed"]},
)
