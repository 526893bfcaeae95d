"""Sampling from a policy, and measuring how good it is."""
