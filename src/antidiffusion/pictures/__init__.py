"""Pictures: pixels in, pixels out, inside a budget."""
