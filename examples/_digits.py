"""The handwritten digits that come with scikit-learn."""

import numpy as np
from sklearn.datasets import load_digits


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1797 images (8, 8) of numbers from 0 to 16, and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    return np.asarray(pixels).reshape(-1, 8, 8), np.asarray(labels)
