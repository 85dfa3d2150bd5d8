"""Names of classes and the prompts around them, read alike everywhere."""
