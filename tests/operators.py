"""What tests of the C++ operators need: a compiler. One that fails on the sources fails the tests."""

from __future__ import annotations

import pytest

from parlay.engine import native

needs_operators = pytest.mark.skipif(native.compiler() is None, reason="needs a C++ compiler")
if native.compiler() is not None:
    assert native.load(), "the C++ operators do not compile"
