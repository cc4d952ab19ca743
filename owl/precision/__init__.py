"""Numbers of eight bits: training as a Lightning plugin, inference as a conversion of weights."""
