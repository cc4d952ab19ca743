"""Metrics that torchmetrics does not have, or not in a form that works here. SSIM comes from torchmetrics."""
