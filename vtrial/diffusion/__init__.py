"""The cascade: network, preconditioning, samplers, weights."""
