"""How many workers a load needs: its requests through a model of the tiers, on a profile's step times."""
