"""Feedforward networks, and their gradient by hand."""

from jaxsoftmax.network.backpropagation import Derivatives, backprop, derivatives, jacobians
from jaxsoftmax.network.flow import GradientFlow, gradient_flow
from jaxsoftmax.network.layers import Layer, forward, init
from jaxsoftmax.network.per_example import per_example_gradient_norms, per_example_gradients

__all__ = [
    "Derivatives",
    "GradientFlow",
    "Layer",
    "backprop",
    "derivatives",
    "forward",
    "gradient_flow",
    "init",
    "jacobians",
    "per_example_gradient_norms",
    "per_example_gradients",
]
