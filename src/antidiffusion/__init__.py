"""Anti-Diffusion: protect pictures against fine-tuning and editing by diffusion models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["RECIPES", "Picture", "Surrogate", "__version__", "protect"]

if TYPE_CHECKING:
    from antidiffusion.models.base import Surrogate
    from antidiffusion.pictures.picture import Picture
    from antidiffusion.protection import protect
    from antidiffusion.recipes import RECIPES

_HOMES = {"RECIPES": "recipes", "Picture": "pictures.picture", "Surrogate": "models.base", "protect": "protection"}


def __getattr__(name: str) -> Any:
    """Import torch only when something that needs it is asked for: `antidiffusion --help` is instant."""
    if name in _HOMES:
        return getattr(import_module(f"antidiffusion.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'antidiffusion' has no attribute {name!r}")
