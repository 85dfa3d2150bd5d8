"""A study's results in words and tables."""
