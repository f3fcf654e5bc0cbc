"""Maps from logits to probabilities, and their derivatives as products and dense arrays."""
