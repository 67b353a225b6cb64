"""Networks whose layers multiply integers."""
