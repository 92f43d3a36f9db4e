"""Measures of a protected picture and of what a model makes of it: pure functions of tensors."""
