"""The vLLM connector of the node's KV store. Engines load `connector.py` by name; the rest needs no torch."""
