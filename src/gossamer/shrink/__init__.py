"""Passes that make a model cheaper, each held to the speed gate, and the recipes that replay them."""
