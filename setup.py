"""Everything about this package is in pyproject.toml; tools that still ask for a setup.py find it here."""

from setuptools import setup

setup()
