"""How transformers start."""

from torch import nn

from gossamer.layers.embed import TokenStem


def init_transformer(model: nn.Module, std: float = 0.02) -> None:
    """Truncated normal weights and zero biases for every linear layer and class token."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, TokenStem) and module.tokens is not None:
            nn.init.trunc_normal_(module.tokens, std=std)
