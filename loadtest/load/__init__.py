"""The load generator: what is said and when, many clients that say it, and what they saw."""
