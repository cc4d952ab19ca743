"""Metrics that torchmetrics does not provide in a suitable form. SSIM is used from torchmetrics."""
