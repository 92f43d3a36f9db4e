"""The benchmark: protections against attacks under one true budget, as rows that a killed run does not lose."""

from antidiffusion.bench.plan import Plan
from antidiffusion.bench.runner import ROWS, run

__all__ = ["ROWS", "Plan", "run"]
