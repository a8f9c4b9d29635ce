"""What the demonstrations of published systems share."""
