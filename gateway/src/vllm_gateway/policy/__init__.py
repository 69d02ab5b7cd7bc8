"""What a request must satisfy before it reaches an engine. Pure functions; no web framework."""
