"""Builds the helper's one extension module; all else is in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["build_helper.py:ffi"], py_modules=[])
