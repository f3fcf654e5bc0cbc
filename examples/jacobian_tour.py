"""A walk through the Jacobian of softmax, from its definition to the vector-Jacobian product and the spectrum.

    python examples/jacobian_tour.py --out out/jacobian_tour

Every number is computed twice, in closed form and by a JAX transformation, and the two are printed side by side.
"""

import jax
import jax.numpy as jnp
import numpy as np
from _common import Parser, folder

import jaxsoftmax as js


def show(title: str, **values) -> None:
    print(f"\n{title}\n{'-' * len(title)}")
    for name, value in values.items():
        text = np.array2string(np.asarray(value), precision=6, suppress_small=True)
        print(f"{name.replace('_', ' '):>24}  " + text.replace("\n", "\n" + " " * 26))


def largest_gap(a, b) -> float:
    return float(jnp.max(jnp.abs(a - b)))


def definition(z: jax.Array) -> None:
    e = jnp.exp(z)
    show("1. Definition: σ_i = exp(z_i) / Σ_k exp(z_k)", z=z, quotient=e / e.sum(), softmax=js.softmax(z))


def quotient_rule(z: jax.Array) -> None:
    """Case i = j: σ_i (1 - σ_i); case i ≠ j: -σ_i σ_j; together J = diag(σ) - σσᵀ."""
    s = js.softmax(z)
    by_cases = jnp.where(jnp.eye(len(z), dtype=bool), s * (1 - s), -jnp.outer(s, s))
    analytic, forward, reverse = js.softmax_jacobian(z), jax.jacfwd(js.softmax)(z), jax.jacrev(js.softmax)(z)
    show(
        "2. The Jacobian by the quotient rule, in closed form, by jacfwd and by jacrev",
        by_cases=by_cases,
        softmax_jacobian=analytic,
        jacfwd=forward,
        jacrev=reverse,
        largest_difference=max(largest_gap(analytic, m) for m in (by_cases, forward, reverse)),
    )


def batched(z: jax.Array) -> None:
    batch = jnp.stack([z, -z, 2 * z])
    one_by_one = jnp.stack([js.softmax_jacobian(row) for row in batch])
    show(
        "3. A batch of logits (B, K) gives a batch of Jacobians (B, K, K)",
        shape=js.softmax_jacobian(batch).shape,
        largest_difference=largest_gap(js.softmax_jacobian(batch), one_by_one),
    )


def properties(z: jax.Array) -> None:
    title = "4. Its properties, measured"
    print(f"\n{title}\n{'-' * len(title)}")
    print(js.verify_jacobian_properties(z))


def products(z: jax.Array, g: jax.Array) -> None:
    s = js.softmax(z)
    show(
        "5. The vector-Jacobian product σ ∘ (g - <g, σ>) needs no matrix",
        g=g,
        softmax_vjp=js.softmax_vjp(g, s),
        jax_vjp=jax.vjp(js.softmax, z)[1](g)[0],
        matrix_times_g=js.softmax_jacobian(z) @ g,
    )


def linear_approximation(z: jax.Array, direction: jax.Array) -> None:
    jacobian = js.SoftmaxJacobian.from_logits(z)
    steps = [0.1, 0.05, 0.025]
    errors = [largest_gap(js.softmax(z + h * direction), js.softmax(z) + jacobian.mv(h * direction)) for h in steps]
    show(
        "6. f(z + Δ) ≈ f(z) + JΔ: half the step, a quarter of the error",
        step=steps,
        error=errors,
        ratio=[a / b for a, b in zip(errors, errors[1:])],
    )


def chain_rule(z: jax.Array) -> None:
    inner = jnp.tanh
    product = js.softmax_jacobian(inner(z)) @ jax.jacfwd(inner)(z)
    whole = jax.jacrev(lambda z: js.softmax(inner(z)))(z)
    show("7. Chain rule: J_h = J_g J_f for h = softmax ∘ tanh", J_g_J_f=product, jacrev_of_h=whole)


def cross_entropy(z: jax.Array) -> None:
    gradient = jax.grad(js.softmax_cross_entropy_with_integer_labels)(z, 0)
    one_hot = jnp.eye(len(z))[0]
    show("8. Cross-entropy: ∂L/∂z = σ - y", by_jax_grad=gradient, sigma_minus_y=js.softmax(z) - one_hot)


def spectrum(z: jax.Array) -> None:
    jacobian = js.SoftmaxJacobian.from_logits(z)
    show(
        "9. The Jacobian as an operator that is never formed",
        eigenvalues=jacobian.eigvalsh(),
        dense_eigenvalues=np.linalg.eigvalsh(np.asarray(jacobian.as_matrix(), np.float64)),
        spectral_norm=jacobian.spectral_norm(),
        trace=jacobian.trace(),
        rank=jacobian.rank(),
        pseudo_logdet=jacobian.pseudo_logdet(),
    )
    million = js.SoftmaxJacobian.from_logits(jnp.sin(jnp.arange(1e6)))
    v = jnp.cos(jnp.arange(1e6))
    residual = million.mv(million.solve(v, 1e-6)) + 1e-6 * million.solve(v, 1e-6) - v
    show(
        "10. The same at a million classes (dense, J would take 4 TB)",
        spectral_norm=million.spectral_norm(),
        log_det_J_plus_damping=million.logdet(1e-6),
        solve_residual=float(jnp.linalg.norm(residual) / jnp.linalg.norm(v)),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=folder, default="out/jacobian_tour", help="folder for the pictures")
    out = parser.parse_args(arguments).out
    z, longer, g = jnp.array([2.0, 1.0, 0.5]), jnp.array([2.0, 1.0, 0.5, -0.5]), jnp.array([0.1, -0.3, 0.2])
    definition(z)
    quotient_rule(z)
    batched(z)
    properties(longer)
    products(z, g)
    linear_approximation(z, g)
    chain_rule(z)
    cross_entropy(z)
    spectrum(longer)
    js.visualize_jacobian(jnp.array([2.0, 1.0, 0.5, -0.5, 0.0])).savefig(out / "jacobian.png")
    js.visualize_spectrum(jnp.array([2.0, 1.0, 0.5, -0.5, 0.0])).savefig(out / "spectrum.png")
    print(f"\nPictures: {out / 'jacobian.png'}, {out / 'spectrum.png'}")


if __name__ == "__main__":
    main()
