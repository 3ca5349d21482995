"""The sim engine: vLLM's batching with step times from a measured profile, and real KV bytes; no torch."""
