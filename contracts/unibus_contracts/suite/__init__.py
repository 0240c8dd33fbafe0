"""The contracts, a file a chapter."""
