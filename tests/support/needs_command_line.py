"""Imported by the tests of what reads a configuration: skips them where its library is not installed.

`pip install` brings it; benchmarks/on_gpu.sh also runs where nothing can be installed.
"""

import pytest

pytest.importorskip("jsonargparse", reason="jsonargparse is not installed")
