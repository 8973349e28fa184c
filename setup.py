"""Maps the import package `oneira` (a namespace, without an `__init__.py`) onto the folders beside this file.

`platform` is also a standard-library module: the folder must never get an `__init__.py` of its own.
"""

from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent
FOLDERS = [name for name in ("platform", "generative", "agents", "multimodal", "cluster") if (HERE / name).is_dir()]

package_dir = {f"oneira.{folder}": folder for folder in FOLDERS}
packages = list(package_dir)
for folder in FOLDERS:
    packages += [f"oneira.{folder}.{inner}" for inner in find_namespace_packages(folder) if "__pycache__" not in inner]

# The weights that ship with the package.
package_data = {"oneira.multimodal": ["builtin/*", "builtin/*/*"]}

setup(packages=packages, package_dir=package_dir, package_data=package_data)
