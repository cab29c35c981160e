"""Token mixers: one mechanism a file, registered, swappable into any block whose grid they support."""

from gossamer.mixers.base import (
    Mixer,
    create_mixer,
    list_mixers,
    mixer_class,
    mixer_keywords,
    options_for,
    register_mixer,
)

__all__ = ["Mixer", "create_mixer", "list_mixers", "mixer_class", "mixer_keywords", "options_for", "register_mixer"]
