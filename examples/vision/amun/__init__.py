"""AMUN: a random part of the training set is forgotten, by its nearest adversarial examples."""
