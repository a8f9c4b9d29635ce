"""What a diffusion model loses, makes, and is recognised to make."""

from .profile import LossProfile, loss_profile

__all__ = ["LossProfile", "loss_profile"]
