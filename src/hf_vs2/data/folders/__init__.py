"""What a folder or a list of images means."""
