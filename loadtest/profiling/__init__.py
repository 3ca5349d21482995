"""How long an engine's steps take: measured, fitted, and written down for the sim engine."""
