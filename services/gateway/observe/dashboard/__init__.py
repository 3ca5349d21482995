"""What an operator sees of the whole cluster: one page, fed live, with the same figures from every gateway."""
