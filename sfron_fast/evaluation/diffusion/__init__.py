"""What a diffusion model loses, makes, and is recognised to make."""

from .grids import grid, save_grid
from .profile import LossProfile, loss_profile
from .recognition import Generation, evaluate_generation, frechet_distance, realism, recognised
from .sampling import sample

__all__ = [
    "Generation",
    "LossProfile",
    "evaluate_generation",
    "frechet_distance",
    "grid",
    "loss_profile",
    "realism",
    "recognised",
    "sample",
    "save_grid",
]
