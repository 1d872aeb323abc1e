"""Results as terminal text and JSON. Plain data in, text out; no torch."""
