"""Memory of curvature products."""

import jax
import jax.numpy as jnp
import pytest

import jaxsoftmax as js
from jaxsoftmax import network
from jaxsoftmax.curvature import ggn_vp
from tests.curvature.test_products import f

pytestmark = pytest.mark.optimized


def test_memory_does_not_grow_with_the_data():
    params = network.init(jax.random.key(0), (32, 64, 10))
    loss = js.softmax_cross_entropy_with_integer_labels

    def temporaries(count, batch_size):
        x, y = jax.ShapeDtypeStruct((count, 32), jnp.float32), jax.ShapeDtypeStruct((count,), jnp.int32)
        product = jax.jit(lambda params, x, y, v: ggn_vp(f, loss, params, x, y, v, batch_size=batch_size))
        return product.lower(params, x, y, params).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4096, 64) < 1.1 * temporaries(1024, 64)
    assert temporaries(4096, None) > 3 * temporaries(1024, None)
