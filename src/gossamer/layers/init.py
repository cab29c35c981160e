"""How transformers start."""

from torch import nn

from gossamer.layers.embed import TokenStem


def init_transformer(model: nn.Module, std: float | None = 0.02) -> None:
    """Truncated normal weights and zero biases for every linear layer and class token.

    Args:
        std: deviation of the weights; None takes `fan_in ** -0.5`, with which narrow models learn sooner.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std or module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, TokenStem) and module.tokens is not None:
            nn.init.trunc_normal_(module.tokens, std=std or 0.02)


def init_by_width(model: nn.Module) -> None:
    """`W ~ N(0, 1 / inputs)`, truncated, for every linear layer (LeCun et al. 1998, "Efficient BackProp").

    The usual 0.02 suits widths near a thousand; a narrow network that starts there passes on hardly any signal and
    spends its first minutes growing its weights.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
