"""Networks: masking, encoder, masked autoencoder. Knows nothing of data sets."""
