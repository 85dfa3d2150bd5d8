"""What is shared on the Hub: pushes, and model cards with everything in them escaped."""
