"""Which latents moved which score of an image, and what latents are called."""
