"""Stands for the folder ``examples`` beside the package while the package is used from a source tree.

A wheel has that folder itself in this place: setuptools' ``package-dir`` in pyproject.toml puts it there.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "examples")]
