"""Who may ask for what, and how much of it: keys, quotas, and the account of what was used."""
