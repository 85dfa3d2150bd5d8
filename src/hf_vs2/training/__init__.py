"""Training and calibration of a sparse autoencoder."""
