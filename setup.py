"""What pyproject.toml cannot say: kernels/ and configs/ are installed inside of the package cosmos_scale."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class FreshBuild(build_py):  # type: ignore[misc]
    """Leaves out what an earlier build of this checkout has left in build/: modules that are gone since then."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "cosmos_scale"), ignore_errors=True)
        super().run()


# In a checkout cosmos_scale/kernels and cosmos_scale/configs are symbolic links to kernels/ and configs/. With this
# mapping wheels carry the files and editable installs reach them, yet no top-level package `kernels` comes about:
# transformers looks for one of that name.
# The links are in no sdist, so find_packages misses both folders there.
FOLDERS = [
    "cosmos_scale.configs",
    *(f"cosmos_scale.configs.{folder.name}" for folder in Path("configs").iterdir() if folder.is_dir()),
]
setup(
    cmdclass={"build_py": FreshBuild},
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
