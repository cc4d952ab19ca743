"""Optimisers, the learning rate schedule, and stepping of several optimisers."""

from owl.optim.muon import MuonAdamW

__all__ = ["MuonAdamW"]
