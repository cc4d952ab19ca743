"""Numbers as text."""


def format_number(value: float) -> str:
    """Format a metric with four significant digits; leave integers unchanged."""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.4g}"
