"""What pyproject.toml cannot say: the folder kernels/ is installed as the package cosmos_scale.kernels."""

from setuptools import find_packages, setup

# In a checkout cosmos_scale/kernels is a symbolic link to kernels/. With this mapping wheels carry the files and
# editable installs reach them, yet no top-level package `kernels` comes about: transformers looks for one of that name.
setup(
    packages=find_packages(include=["cosmos_scale", "cosmos_scale.*"]),
    package_dir={"cosmos_scale": "cosmos_scale", "cosmos_scale.kernels": "kernels"},
)
