"""`python -m jaxsoftmax.matrix_calculus`: the table of identities, each with its error at a random point."""

import jax

from jaxsoftmax.matrix_calculus.identities import IDENTITIES


def print_table() -> None:
    """Print the identities, each with its error at a random point."""
    print(f"{'name':24} {'identity':77} {'error':>8}  reference")
    for identity in IDENTITIES.values():
        error = identity.error(jax.random.key(0))
        print(f"{identity.name:24} {identity.formula:77} {error:8.1e}  {identity.reference}".rstrip())


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print_table()
