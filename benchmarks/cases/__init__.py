"""What is measured: lists of weights, models, arms and cases."""
