"""The loop of every training, what the masked autoencoder and MixIT add to it, and what a trained folder carries."""
