"""Conditions under which tests can run, each with the sentence that a skip prints."""

import pytest

from services.executor.ops.numpy_ops import is_row_invariant

needs_invariant_blas = pytest.mark.skipif(
    not is_row_invariant({(72, 48), (256, 1024)}),
    reason="this machine's BLAS rounds a row differently beside others: the backend computes rows one at a time",
)
