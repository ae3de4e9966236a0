"""What pyproject.toml cannot say: kernels/ and configs/ are installed inside of the package cosmos_scale."""

from pathlib import Path

from setuptools import find_packages, setup

# In a checkout cosmos_scale/kernels and cosmos_scale/configs are symbolic links to kernels/ and configs/. With this
# mapping wheels carry the files and editable installs reach them, yet no top-level package `kernels` comes about:
# transformers looks for one of that name.
# The links are in no sdist, so find_packages misses both folders there.
FOLDERS = [
    "cosmos_scale.configs",
    *(f"cosmos_scale.configs.{folder.name}" for folder in Path("configs").iterdir() if folder.is_dir()),
]
setup(
    packages=sorted({*find_packages(include=["cosmos_scale", "cosmos_scale.*"]), "cosmos_scale.kernels", *FOLDERS}),
    package_dir={"cosmos_scale": "cosmos_scale", "cosmos_scale.kernels": "kernels", "cosmos_scale.configs": "configs"},
    package_data={
        "cosmos_scale": ["py.typed"],
        **{name: ["*.yaml"] for name in FOLDERS},
        "cosmos_scale.evaluation.prompts": ["*.txt"],
        "cosmos_scale.report": ["templates/*"],
        "cosmos_scale.evaluation.segmentation": ["class_names/*"],
    },
)
