"""A study's results as figures; matplotlib is imported when one is drawn."""
