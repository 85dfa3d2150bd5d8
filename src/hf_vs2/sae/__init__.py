"""The sparse autoencoder, and the statistics of the images that it was trained on."""
