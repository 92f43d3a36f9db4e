"""Synthetic head-and-shoulders portraits with exact captions and known identities, from CC0 assets and our own code."""
