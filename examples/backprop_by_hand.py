"""Backpropagation by hand, on a network that reads digits: derive, compute, compare.

    python examples/backprop_by_hand.py

A lesson in five steps, to be read beside its output. The network has no biases, as in the text it follows:

    z_n = W_n a_{n-1},    a_n = σ(z_n),    a_0 = x,    l = f(z_N),    σ = tanh,    f the cross-entropy.

Derivatives are in numerator layout: by a vector a row, by W_n a matrix of the shape of W_nᵀ.
"""

import jax
import jax.numpy as jnp
from _common import Parser, folder
from _digits import digits

from jaxsoftmax import network, softmax
from jaxsoftmax import softmax_cross_entropy_with_integer_labels as cross_entropy
from jaxsoftmax.matrix_calculus import differential, frobenius, numerator_layout
from jaxsoftmax.plotting import visualize_gradient_flow

SIZES = (64, 32, 32, 10)


def say(text: str) -> None:
    print(f"\n{text}")


def compare(name: str, by_hand: jax.Array, by_jax: jax.Array) -> None:
    difference = float(jnp.max(jnp.abs(by_hand - by_jax)) / jnp.max(jnp.abs(by_jax)))
    print(f"   {name:14} {'×'.join(map(str, by_hand.shape)) or 'scalar':>8}   relative difference {difference:.1e}")


def one_example(params, x, label):
    """Steps 1 to 3: forward, the loss head, and back."""
    say("1. Forward. Keep every z_n and a_n: the way back needs them.")
    W1, W2, W3 = (layer.W for layer in params)
    z1 = W1 @ x
    a1 = jnp.tanh(z1)
    z2 = W2 @ a1
    a2 = jnp.tanh(z2)
    z3 = W3 @ a2
    compare("z_3", z3, network.forward(params, x))

    say("2. The loss. l = logsumexp(z_3) - z_label, dl = pᵀdz_3 - dz_label, so ∂l/∂z_3 = (p - y)ᵀ, a row.")
    y = jax.nn.one_hot(label, 10)
    dz3 = (softmax(z3) - y)[None, :]
    compare("∂l/∂z_3", dz3, jax.grad(cross_entropy)(z3, label)[None, :])

    say(
        "3. Back. dl = (∂l/∂z_n)ᵀ : dW_n a_{n-1} = (∂l/∂z_n)ᵀ a_{n-1}ᵀ : dW_n, so ∂l/∂W_n = a_{n-1} ∂l/∂z_n;\n"
        "   and dl = ∂l/∂z_n W_n da_{n-1}, with da = diag(σ′) dz, so ∂l/∂z_{n-1} = ∂l/∂z_n W_n diag(1 - a²)."
    )
    dW3 = a2[:, None] @ dz3
    dz2 = dz3 @ W3 @ jnp.diag(1 - a2**2)
    dW2 = a1[:, None] @ dz2
    dz1 = dz2 @ W2 @ jnp.diag(1 - a1**2)
    dW1 = x[:, None] @ dz1
    rows = [dW1, dW2, dW3]
    gradient = jax.grad(lambda params: cross_entropy(network.forward(params, x), label))(params)
    for n, (row, layer) in enumerate(zip(rows, numerator_layout(gradient)), 1):
        compare(f"∂l/∂W_{n}", row, layer.W)
    compare("∂l/∂z_1", dz1, network.derivatives(params, x, label, cross_entropy).z[0][None, :])
    return rows


def check_differential(params, rows, x, label):
    say("4. What the derivative is for: dl = Σ_n (∂l/∂W_n)ᵀ : dW_n predicts the change of the loss.")
    keys = jax.random.split(jax.random.key(1), len(params))
    step = [layer._replace(W=jax.random.normal(key, layer.W.shape)) for key, layer in zip(keys, params)]
    loss = lambda params: cross_entropy(network.forward(params, x), label)
    predicted = jnp.sum(jnp.stack([frobenius(row.T, layer.W) for row, layer in zip(rows, step)]))
    compare("dl", predicted, differential(loss)(params, tuple(step)))
    print(f"   {'t':>8} {'l(W + t dW) - l(W)':>20} {'t dl':>12}")
    for t in (0.1, 0.01, 0.001):
        moved = [layer._replace(W=layer.W + t * d.W) for layer, d in zip(params, step)]
        print(f"   {t:8} {loss(moved) - loss(params):20.6f} {t * predicted:12.6f}")


def train(params, x, labels, test_x, test_labels, steps: int):
    say(f"5. The mean over a batch, and down it: {steps} steps of gradient descent with the gradient by hand.")
    gradient = jax.jit(lambda params: network.backprop(params, x, labels, cross_entropy))
    by_jax = jax.grad(lambda params: cross_entropy(network.forward(params, x), labels).mean())(params)
    for n, (ours, theirs) in enumerate(zip(gradient(params), by_jax), 1):
        compare(f"mean ∂l/∂W_{n}", ours.W, theirs.W)
    norms = network.per_example_gradient_norms(params, x, labels, cross_entropy)
    print(f"   gradients of single examples: norms from {norms.min():.2f} to {norms.max():.2f}, none of them formed")
    print(f"   {'step':>6} {'training loss':>14} {'test accuracy':>14}")
    for step in range(steps + 1):
        if step % (steps // 5) == 0:
            loss = cross_entropy(network.forward(params, x), labels).mean()
            accuracy = jnp.mean(network.forward(params, test_x).argmax(-1) == test_labels)
            print(f"   {step:6} {loss:14.4f} {accuracy:13.2%}")
        params = jax.tree.map(lambda w, g: w - 0.5 * g, params, gradient(params))
    return params


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--steps", type=int, default=500, help="steps of gradient descent, at least 5")
    parser.add_argument("--out", type=folder, default="out/backprop", help="folder for the pictures")
    options = parser.parse_args(arguments)
    if options.steps < 5:
        parser.error(f"--steps must be at least 5, got {options.steps}")

    images, labels = digits()
    x = jnp.asarray((images - images.mean(0)).reshape(len(images), -1) / 8, jnp.float32)
    labels = jnp.asarray(labels, jnp.int32)
    train_x, train_labels, test_x, test_labels = x[:1400], labels[:1400], x[1400:], labels[1400:]
    params = network.init(jax.random.key(0), SIZES, bias=False)

    rows = one_example(params, train_x[0], train_labels[0])
    check_differential(params, rows, train_x[0], train_labels[0])
    trained = train(params, train_x, train_labels, test_x, test_labels, options.steps)

    for name, weights in (("before", params), ("after", trained)):
        figure = visualize_gradient_flow(weights, test_x[:100], test_labels[:100], cross_entropy)
        figure.suptitle(f"Gradient flow on 100 test digits, {name} training")
        figure.savefig(options.out / f"gradient_flow_{name}.png")
    say(f"The flow of gradients through the layers, before and after, is drawn in {options.out}.")


if __name__ == "__main__":
    main()
