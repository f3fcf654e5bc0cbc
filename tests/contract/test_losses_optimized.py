"""Every loss head: rounding of half precision."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.contract.test_losses import cast, over_heads, value_and_gradient
from tests.registry.samples import Z


@over_heads
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_logits(head, dtype):
    """The loss is that of the same logits in float32; its gradient comes back in their dtype, rounded once."""
    options = dict(head.options[-1])
    z, *args = cast([Z, *head.args], dtype)
    loss, gradient = value_and_gradient(head, z, args, **options)
    wide = value_and_gradient(head, z.astype("float32"), cast(args, "float32"), **options)
    assert loss.dtype == jnp.float32 and gradient.dtype == z.dtype
    np.testing.assert_allclose(loss, wide[0], rtol=2e-7, atol=1e-9)
    once = np.asarray(wide[1].astype(dtype), "float64")
    assert np.all(abs(np.asarray(gradient, "float64") - once) <= float(jnp.finfo(dtype).eps) * abs(once))
