"""SIU: an image-text model forgets a visual name from one image."""
