"""The arithmetic of a decoder: weights, adapters, products. It knows no cache and no schedule."""
