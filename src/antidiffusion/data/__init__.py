"""Data sets: edits in words with their true results, and people with several photos each."""
