"""Systems: one file each, composed of the floors below, with named variants and official weights."""

from gossamer.models.registry import create_model, list_models, load_official, model_card, register_system

__all__ = ["create_model", "list_models", "load_official", "model_card", "register_system"]
