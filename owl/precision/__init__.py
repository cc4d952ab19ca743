"""Float8: a Lightning plugin for training, and quantisation of weights for inference."""
