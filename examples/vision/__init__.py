"""Published systems on images."""
