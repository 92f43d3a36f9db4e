"""Latent diffusion models of every family behind one interface."""
