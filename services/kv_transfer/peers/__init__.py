"""Blocks from one node's arena to another's: the transport, and what the store does with it at both ends."""
