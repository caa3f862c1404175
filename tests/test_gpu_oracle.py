"""The fast oracle of the GPU tests says what the slow one says."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_oracle import attention_oracle
from reference import make_case, reference_attention

OPTIONS = {
    "plain": {},
    "window": {"window": 6},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": np.linspace(-1, 2, 6, dtype=np.float32)},
    "all": {"window": 3, "softcap": 20.0, "sinks": np.linspace(-1, 2, 6, dtype=np.float32)},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("name", OPTIONS)
def test_fast_oracle_is_the_oracle(name, T, dtype):
    case = make_case((0, 1, 3, 17, 40), T, 6, 2, 16, dtype=dtype).with_dead_slots(np.nan, np.nan)
    inputs = (case.q, case.k, case.v, case.kv_len)
    for found, expected in zip(
        attention_oracle(*inputs, **OPTIONS[name]),
        reference_attention(*inputs, **OPTIONS[name]),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
