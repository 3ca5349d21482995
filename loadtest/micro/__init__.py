"""Parts of Baton by themselves, each next to its raw limit: the token path and the KV plane."""
