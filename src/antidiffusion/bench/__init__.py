"""The benchmark: protections against attacks under one true budget, as rows that a killed run does not lose."""
