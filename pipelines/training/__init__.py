"""Training, from a data set to a registered model."""
