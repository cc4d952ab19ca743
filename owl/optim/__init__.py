"""Optimisers, the learning rate's schedule, and how a recipe steps several optimisers."""

from owl.optim.muon import MuonAdamW

__all__ = ["MuonAdamW"]
