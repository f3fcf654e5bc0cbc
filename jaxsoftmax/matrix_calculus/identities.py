"""Identities of matrix differential calculus, as data: what the differential of a function is, and where.

Each left side is a function, whose differential JAX finds; each right side is the formula of the textbooks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxsoftmax._core import checks
from jaxsoftmax.maps.softmax import logsumexp, softmax


class Identity(NamedTuple):
    """One line of the table: df(X, Y, …) = right(X, Y, …, dX, dY, …).

    Args:
      name: what it is called.
      formula: as it is written.
      domain: where each argument lives: "m×n" any matrix of that shape, "n" a vector, "1" a scalar, "GL(n)" an
        invertible matrix, "Sym(n)" a symmetric one (its differential too), "Pos(n)" one that is positive definite.
      f: the function on the left.
      right: the right side, of the arguments and then of their differentials.
      reference: number of the formula in The Matrix Cookbook (2012), or another source.

    Example:
      >>> import jax
      >>> from jaxsoftmax.matrix_calculus import IDENTITIES
      >>> product = IDENTITIES["product"]
      >>> X, dX = product.sample(jax.random.key(0))
      >>> left, right = product.left(X, dX), product.right(*X, *dX)
      >>> print(product.formula, left.shape, bool(abs(left - right).max() < 1e-5))
      d(XY) = dX Y + X dY (4, 2) True

    Reference: Petersen and Pedersen, The Matrix Cookbook (2012).
    """

    name: str
    formula: str
    domain: tuple[str, ...]
    f: Callable[..., Any]
    right: Callable[..., Array]
    reference: str = ""

    def left(self, X: tuple[Array, ...], dX: tuple[Array, ...]) -> Array:
        """The left side: the differential of f at X in the direction dX."""
        return jax.jvp(self.f, X, dX)[1]

    def sample(self, key: Array, dtype: DTypeLike = float) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """A random point (X, dX) of the domain."""
        checks.float_dtype("dtype", dtype)
        keys = jax.random.split(checks.key("key", key), (2, len(self.domain)))
        X = tuple(_point(k, space, dtype) for k, space in zip(keys[0], self.domain))
        return X, tuple(_tangent(k, space, dtype) for k, space in zip(keys[1], self.domain))

    def error(self, key: Array, dtype: DTypeLike = float) -> Array:
        """max |left - right| / max |left| at a random point."""
        X, dX = self.sample(key, dtype)
        left = self.left(X, dX)
        return jnp.max(jnp.abs(left - self.right(*X, *dX))) / jnp.max(jnp.abs(left))


SIZES = {"m": 4, "n": 3, "p": 2, "q": 5, "1": 1}


def _tangent(key: Array, space: str, dtype: DTypeLike) -> Array:
    """A random direction: a Gaussian array of the shape that the space's letters give, symmetric where it must be."""
    if space == "1":
        return jax.random.normal(key, (), dtype)
    if "(" in space:
        dX = jax.random.normal(key, 2 * (SIZES[space[-2]],), dtype)
        return dX if space.startswith("GL") else (dX + dX.T) / 2
    return jax.random.normal(key, tuple(SIZES[letter] for letter in space.split("×")), dtype)


def _point(key: Array, space: str, dtype: DTypeLike) -> Array:
    X = _tangent(key, space, dtype)
    if space.startswith("Pos"):
        return X @ X.T + jnp.eye(len(X), dtype=dtype)
    if space.startswith("GL"):
        U, _, Vh = jnp.linalg.svd(X)  # singular values 1, 2, …: invertible, of either orientation
        return (U * jnp.arange(1, len(X) + 1, dtype=dtype)[None, :]) @ Vh
    return X


def _adjugate(X: Array) -> Array:
    """adj(X)_ij = (-1)^(i+j) times the minor of X without row j and column i; also where X is singular."""
    n = range(len(X))
    minors = [[jnp.linalg.det(jnp.delete(jnp.delete(X, j, 0), i, 1)) * (-1) ** (i + j) for j in n] for i in n]
    return jnp.stack([jnp.stack(row) for row in minors])


def _colon(A: Array, B: Array) -> Array:
    return jnp.sum(A * B)


def _vec(X: Array) -> Array:
    """vec(X): the columns of X one below the other."""
    return X.T.reshape(-1)


def _vec_product_differential(A: Array, X: Array, B: Array, dA: Array, dX: Array, dB: Array) -> Array:
    left, right = (jnp.eye(n, dtype=X.dtype) for n in (A.shape[0], B.shape[1]))
    return jnp.kron((X @ B).T, left) @ _vec(dA) + jnp.kron(B.T, A) @ _vec(dX) + jnp.kron(right, A @ X) @ _vec(dB)


def _least_squares_differential(W: Array, X: Array, Y: Array, dW: Array, dX: Array, dY: Array) -> Array:
    R = X @ W - Y
    return 2 * (_colon(X.T @ R, dW) + _colon(R @ W.T, dX) - _colon(R, dY))


def _lower_half(X: Array) -> Array:
    """The lower triangle with half the diagonal: L + Lᵀ of it gives back a symmetric X."""
    return jnp.tril(X) - jnp.diag(jnp.diag(X)) / 2


def _cholesky_differential(X: Array, dX: Array) -> Array:
    L = jnp.linalg.cholesky(X)
    inverse = jnp.linalg.inv(L)
    return L @ _lower_half(inverse @ dX @ inverse.T)


def _singular_vectors(X: Array) -> tuple[Array, Array]:
    """The singular vectors U, Vᵀ of X."""
    U, _, Vh = jnp.linalg.svd(X, full_matrices=False)
    return U, Vh


def _nuclear_differential(X: Array, dX: Array) -> Array:
    U, Vh = _singular_vectors(X)
    return _colon(U @ Vh, dX)


def _spectral_differential(X: Array, dX: Array) -> Array:
    U, Vh = _singular_vectors(X)
    return U[:, 0] @ dX @ Vh[0]


def _eigenvalue_differential(X: Array, dX: Array) -> Array:
    _, V = jnp.linalg.eigh(X)
    return jnp.diag(V.T @ dX @ V)


def _softmax_jacobian(z: Array) -> Array:
    p = softmax(z)
    return jnp.diag(p) - jnp.outer(p, p)


det, inv, norm = jnp.linalg.det, jnp.linalg.inv, jnp.linalg.norm
# fmt: off
_TABLE = (
    Identity("linear combination", "d(αX + Y) = dα X + α dX + dY", ("1", "m×n", "m×n"),
             lambda a, X, Y: a * X + Y, lambda a, X, Y, da, dX, dY: da * X + a * dX + dY, "Cookbook (34), (35)"),
    Identity("product", "d(XY) = dX Y + X dY", ("m×n", "n×p"),
             lambda X, Y: X @ Y, lambda X, Y, dX, dY: dX @ Y + X @ dY, "Cookbook (37)"),
    Identity("Hadamard product", "d(X∘Y) = dX∘Y + X∘dY", ("m×n", "m×n"),
             lambda X, Y: X * Y, lambda X, Y, dX, dY: dX * Y + X * dY, "Cookbook (38)"),
    Identity("Kronecker product", "d(X⊗Y) = dX⊗Y + X⊗dY", ("m×n", "p×q"),
             jnp.kron, lambda X, Y, dX, dY: jnp.kron(dX, Y) + jnp.kron(X, dY), "Cookbook (39)"),
    Identity("Frobenius product", "d(X:Y) = dX:Y + X:dY", ("m×n", "m×n"),
             lambda X, Y: jnp.trace(X.T @ Y), lambda X, Y, dX, dY: _colon(dX, Y) + _colon(X, dY), "London (2024)"),
    Identity("outer product", "d(xyᵀ) = dx yᵀ + x dyᵀ", ("m", "n"),
             jnp.outer, lambda x, y, dx, dy: jnp.outer(dx, y) + jnp.outer(x, dy), "Cookbook (37)"),
    Identity("transpose", "d(Xᵀ) = (dX)ᵀ", ("m×n",), jnp.transpose, lambda X, dX: dX.T, "Cookbook (44)"),
    Identity("vec", "d vec(X) = vec(dX)", ("m×n",), _vec, lambda X, dX: _vec(dX)),
    Identity("vec of a product", "d vec(AXB) = (BᵀXᵀ⊗I) vec(dA) + (Bᵀ⊗A) vec(dX) + (I⊗AX) vec(dB)",
             ("q×m", "m×n", "n×p"), lambda A, X, B: _vec(A @ X @ B), _vec_product_differential, "Cookbook (520)"),
    Identity("power", "d(X³) = dX X² + X dX X + X² dX", ("n×n",),
             lambda X: X @ X @ X, lambda X, dX: dX @ X @ X + X @ dX @ X + X @ X @ dX, "Cookbook (37)"),
    Identity("inverse", "d(X⁻¹) = -X⁻¹ dX X⁻¹", ("GL(n)",), inv, lambda X, dX: -inv(X) @ dX @ inv(X), "Cookbook (40)"),
    Identity("linear system", "d(X⁻¹b) = X⁻¹(db - dX X⁻¹b)", ("GL(n)", "n"), jnp.linalg.solve,
             lambda X, b, dX, db: inv(X) @ (db - dX @ inv(X) @ b), "Cookbook (37), (40)"),
    Identity("trace", "d tr X = tr dX", ("n×n",), jnp.trace, lambda X, dX: jnp.trace(dX), "Cookbook (36)"),
    Identity("trace of a product", "d tr(XY) = Yᵀ:dX + Xᵀ:dY", ("m×n", "n×m"),
             lambda X, Y: jnp.trace(X @ Y), lambda X, Y, dX, dY: _colon(Y.T, dX) + _colon(X.T, dY), "Cookbook (100)"),
    Identity("trace of an inverse", "d tr(X⁻¹) = -X⁻ᵀX⁻ᵀ:dX", ("GL(n)",),
             lambda X: jnp.trace(inv(X)), lambda X, dX: -_colon((inv(X) @ inv(X)).T, dX), "Cookbook (64)"),
    Identity("determinant, adjugate", "d det X = adj(X)ᵀ:dX", ("n×n",),
             det, lambda X, dX: _colon(_adjugate(X).T, dX), "Cookbook (41)"),
    Identity("determinant, inverse", "d det X = det(X) X⁻ᵀ:dX", ("GL(n)",),
             det, lambda X, dX: det(X) * _colon(inv(X).T, dX), "Cookbook (42)"),
    Identity("log-determinant", "d log|det X| = X⁻ᵀ:dX", ("GL(n)",),
             lambda X: jnp.linalg.slogdet(X)[1], lambda X, dX: _colon(inv(X).T, dX), "Cookbook (43)"),
    Identity("squared norm", "d‖x‖² = 2 xᵀdx", ("n",), lambda x: x @ x, lambda x, dx: 2 * x @ dx, "Cookbook (131)"),
    Identity("norm", "d‖x‖ = xᵀdx / ‖x‖", ("n",), norm, lambda x, dx: x @ dx / norm(x), "Cookbook (129)"),
    Identity("direction", "d(x/‖x‖) = (dx - x xᵀdx / ‖x‖²) / ‖x‖", ("n",), lambda x: x / norm(x),
             lambda x, dx: (dx - x * (x @ dx) / (x @ x)) / norm(x), "Cookbook (130)"),
    Identity("squared Frobenius norm", "d‖X‖² = 2X:dX", ("m×n",),
             lambda X: jnp.trace(X @ X.T), lambda X, dX: 2 * _colon(X, dX), "Cookbook (132)"),
    Identity("Frobenius norm", "d‖X‖ = X:dX / ‖X‖", ("m×n",), norm, lambda X, dX: _colon(X, dX) / norm(X)),
    Identity("nuclear norm", "d‖X‖_* = UVᵀ:dX, X = UΣVᵀ", ("m×n",),
             lambda X: jnp.sum(jnp.linalg.svd(X, compute_uv=False)), _nuclear_differential),
    Identity("spectral norm", "dσ₁(X) = u₁v₁ᵀ:dX, X = UΣVᵀ", ("m×n",),
             lambda X: jnp.linalg.svd(X, compute_uv=False)[0], _spectral_differential),
    Identity("eigenvalues", "dλ_i = v_iᵀ dX v_i, X v_i = λ_i v_i", ("Sym(n)",),
             jnp.linalg.eigvalsh, _eigenvalue_differential, "Cookbook (67)"),
    Identity("Cholesky factor", "dL = L low(L⁻¹ dX L⁻ᵀ), X = LLᵀ, low(S) + low(S)ᵀ = S", ("Pos(n)",),
             jnp.linalg.cholesky, _cholesky_differential, "Murray (2016), arXiv:1602.07527"),
    Identity("bilinear form", "d(xᵀAy) = xyᵀ:dA + (Ay)ᵀdx + (Aᵀx)ᵀdy", ("m", "m×n", "n"),
             lambda x, A, y: x @ A @ y,
             lambda x, A, y, dx, dA, dy: _colon(jnp.outer(x, y), dA) + (A @ y) @ dx + (A.T @ x) @ dy, "Cookbook (70)"),
    Identity("quadratic form", "d(xᵀAx) = ((A + Aᵀ)x)ᵀdx + xxᵀ:dA", ("n", "n×n"), lambda x, A: x @ A @ x,
             lambda x, A, dx, dA: (A + A.T) @ x @ dx + _colon(jnp.outer(x, x), dA), "Cookbook (81)"),
    Identity("squared error", "d‖z - ŷ‖² = 2(z - ŷ):d(z - ŷ)", ("n", "n"),
             lambda z, y: (z - y) @ (z - y), lambda z, y, dz, dy: 2 * _colon(z - y, dz - dy), "London (2024)"),
    Identity("least squares", "d‖R‖² = 2XᵀR:dW + 2RWᵀ:dX - 2R:dY, R = XW - Y", ("n×p", "m×n", "m×p"),
             lambda W, X, Y: jnp.sum((X @ W - Y) ** 2), _least_squares_differential, "Cookbook (119)"),
    Identity("layer", "d(Wa) = dW a + W da", ("m×n", "n"),
             lambda W, a: W @ a, lambda W, a, dW, da: dW @ a + W @ da, "London (2024)"),
    Identity("loss of a layer", "d f(Wa) = ∇f aᵀ:dW + (Wᵀ∇f):da, f = logsumexp, ∇f = softmax(Wa)", ("m×n", "n"),
             lambda W, a: logsumexp(W @ a),
             lambda W, a, dW, da: _colon(jnp.outer(softmax(W @ a), a), dW) + (W.T @ softmax(W @ a)) @ da,
             "London (2024)"),
    Identity("chain rule", "d f(g(x)) = J_f(g(x)) J_g(x) dx, f = softmax, g = tanh", ("n",),
             lambda x: softmax(jnp.tanh(x)),
             lambda x, dx: _softmax_jacobian(jnp.tanh(x)) @ jnp.diag(1 - jnp.tanh(x) ** 2) @ dx,
             "docs/mathematics.md, section 1.2"),
    Identity("element-wise function", "dσ(X) = σ′(X)∘dX, σ = tanh, σ′ = 1 - σ²", ("m×n",),
             jnp.tanh, lambda X, dX: (1 - jnp.tanh(X) ** 2) * dX),
    Identity("exponential", "d exp(X) = exp(X)∘dX, entry by entry", ("m×n",), jnp.exp, lambda X, dX: jnp.exp(X) * dX),
    Identity("logsumexp", "d lse(z) = pᵀdz, p = softmax(z)", ("n",), logsumexp, lambda z, dz: softmax(z) @ dz),
    Identity("softmax", "dp = (diag(p) - ppᵀ)dz, p = softmax(z)", ("n",),
             softmax, lambda z, dz: _softmax_jacobian(z) @ dz, "docs/mathematics.md, section 1.2"),
    Identity("cross-entropy", "d(lse(z) - yᵀz) = (p - y)ᵀdz - zᵀdy", ("n", "n"),
             lambda z, y: logsumexp(z) - y @ z, lambda z, y, dz, dy: (softmax(z) - y) @ dz - z @ dy,
             "docs/mathematics.md, section 1.2"),
)
# fmt: on
IDENTITIES: dict[str, Identity] = {identity.name: identity for identity in _TABLE}
