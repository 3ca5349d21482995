"""What became of requests, span by span: collected from every service, kept for those worth it, shown and exported."""
