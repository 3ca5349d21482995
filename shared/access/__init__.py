"""API keys and the use that is made of them, as the gateway and the `baton keys` command must agree on them."""
