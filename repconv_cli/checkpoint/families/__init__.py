"""Weights alone: the family by their keys, its blocks, and each block rebuilt from ``torch.nn`` parts."""
