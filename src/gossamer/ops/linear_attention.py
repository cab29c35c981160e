"""Linear attention: softmax's exponential replaced by a product of feature maps, so that no n x n matrix is needed.

Source: Katharopoulos et al. 2020, "Transformers are RNNs"; Choromanski et al. 2021, "Rethinking Attention with
Performers" (positive orthogonal random features, generalised ReLU features).

- `y_i = phi(q_i)^T S / (phi(q_i)^T z + eps)` with `S = sum_j phi(k_j) v_j^T`, `z = sum_j phi(k_j)`
- bidirectional: multiplied in the order that costs fewer MACs
- causal: chunks, dense within and by prefix sums between them; `step` decodes with the same state
- a feature map is any function of a tensor's last axis; queries and keys may have different ones
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

FeatureMap = Callable[[Tensor], Tensor]


class LinearState(NamedTuple):
    """All that causal linear attention keeps of the past."""

    kv: Float[Tensor, "*b m e"]
    z: Float[Tensor, "*b m"]


# ---- feature maps --------------------------------------------------------------------------------------------


def identity(x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
    """`x`: for maps applied beforehand, or attention without a normaliser."""
    return x


def elu1(x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
    """`elu(x) + 1`, Katharopoulos' positive map."""
    return F.elu(x) + 1


def relu(x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
    """`max(x, 0)`."""
    return F.relu(x)


def relu_eps(x: Float[Tensor, "*b n d"], eps: float = 1e-3) -> Float[Tensor, "*b n d"]:
    """`max(x, 0) + eps`: the Performer's generalised attention without projection."""
    return F.relu(x) + eps


def squared_relu(x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
    """`max(x, 0)^2`."""
    return F.relu(x).square()


def exponential(x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
    """`exp(x)`."""
    return x.exp()


def softmax_features(
    x: Float[Tensor, "*b n d"],
    projection: Float[Tensor, "m d"],
    *,
    is_query: bool,
    scale: float | None = None,
    eps: float = 1e-6,
) -> Float[Tensor, "*b n m"]:
    """FAVOR+: `phi(x) = (exp(w x - |x|^2 / 2 - c) + eps) / sqrt(m)`, so that `E phi(q).phi(k) ~ exp(scale q.k)`.

    The stabiliser `c` (per query; one for all keys of a head) cancels in the quotient, apart from `eps`.

    Args:
        projection: rows `w`, see `orthogonal_projection`.
        is_query: which of the two stabilisers.
        scale: of the logit `q.k`; None: `d ** -0.5`. Half of it (its root) goes to each side.
        eps: keeps every feature positive.
    """
    x = x * (x.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    logits = x @ projection.mT - x.square().sum(-1, keepdim=True) / 2
    top = logits.detach().amax((-1,) if is_query else (-2, -1), keepdim=True)
    return ((logits - top).exp() + eps) * projection.shape[0] ** -0.5


def orthogonal_projection(
    m: int,
    d: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Float[Tensor, "{m} {d}"]:
    """`m` Gaussian directions of width `d`, orthogonal in groups of `d`, with norms of independent Gaussians.

    Drawn on the CPU in double precision, so that a seed gives the same projection everywhere.
    """
    if m < 1 or d < 1:
        raise ValueError(f"m and d must be at least 1, got m={m}, d={d}")
    groups = -(-m // d)
    normal = torch.randn(groups, d, d, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    # QR fixes signs by a rule of its own; undone, every direction is uniform and the features are unbiased
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    directions = q.mT.reshape(groups * d, d)[:m]
    norms = torch.randn(m, d, generator=generator, dtype=torch.float64).norm(dim=-1, keepdim=True)
    return (directions * norms).to(device=device, dtype=dtype)


# ---- attention -----------------------------------------------------------------------------------------------


def _features(
    q: Tensor, k: Tensor, feature_map: FeatureMap | tuple[FeatureMap, FeatureMap], mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    of_q, of_k = feature_map if isinstance(feature_map, tuple) else (feature_map, feature_map)
    fq, fk = of_q(q), of_k(k)
    if mask is not None:
        fk = fk.masked_fill(~mask[..., None], 0.0)
    return fq, fk


def linear_attention(
    q: Float[Tensor, "*b n_q d"],
    k: Float[Tensor, "*b n_k d"],
    v: Float[Tensor, "*b n_k e"],
    feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] = elu1,
    *,
    causal: bool = False,
    mask: Bool[Tensor, "*#b n_k"] | None = None,
    eps: float = 1e-6,
    normalise: bool = True,
) -> Float[Tensor, "*b n_q e"]:
    """`y_i = sum_j phi(q_i).phi(k_j) v_j / (sum_j phi(q_i).phi(k_j) + eps)`.

    Args:
        feature_map: of queries and keys, or a pair of maps.
        causal: `j <= i` only.
        mask: True for keys that exist.
        eps: added to the normaliser.
        normalise: divide by the sum of the weights; without it only the numerator is returned.
    """
    if causal:
        return causal_linear_attention(q, k, v, feature_map, mask=mask, eps=eps, normalise=normalise)[0]
    fq, fk = _features(q, k, feature_map, mask)
    n_q, n_k, m, e = q.shape[-2], k.shape[-2], fq.shape[-1], v.shape[-1]
    # an exported graph must serve every length, so it takes the order that is safe for long ones
    if not torch.compiler.is_exporting() and n_q * n_k * (m + e) < (n_q + n_k) * m * e:
        weights = fq @ fk.transpose(-2, -1)
        y = weights @ v
        return y / (weights.sum(-1, keepdim=True) + eps) if normalise else y
    y = fq @ (fk.transpose(-2, -1) @ v)
    return y / (fq @ fk.sum(-2)[..., None] + eps) if normalise else y


def causal_linear_attention(
    q: Float[Tensor, "*b n d"],
    k: Float[Tensor, "*b n d"],
    v: Float[Tensor, "*b n e"],
    feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] = elu1,
    *,
    state: LinearState | None = None,
    mask: Bool[Tensor, "*#b n"] | None = None,
    eps: float = 1e-6,
    normalise: bool = True,
    chunk: int = 64,
) -> tuple[Float[Tensor, "*b n e"], LinearState]:
    """Causal linear attention after `state`, and the state after the last token.

    Args:
        state: of the tokens before these; None: there were none.
        chunk: tokens per chunk; dense inside, all chunks in parallel.
        (others as in `linear_attention`)

    Raises:
        ValueError: `chunk` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    fq, fk = _features(q, k, feature_map, mask)
    n, m, e = q.shape[-2], fq.shape[-1], v.shape[-1]
    chunks = (n + chunk - 1) // chunk
    pad = chunks * chunk - n
    fq, fk, v = (F.pad(t, (0, 0, 0, pad)).unflatten(-2, (chunks, chunk)) for t in (fq, fk, v))
    if state is None:
        lead = fq.shape[:-3]
        state = LinearState(fq.new_zeros(*lead, m, e), fq.new_zeros(*lead, m))
    # entry i: the state before chunk i; the last entry: after all of them
    kv = torch.cat([state.kv[..., None, :, :], fk.transpose(-2, -1) @ v], -3).cumsum(-3)
    z = torch.cat([state.z[..., None, :], fk.sum(-2)], -2).cumsum(-2)
    weights = (fq @ fk.transpose(-2, -1)).tril()
    y = weights @ v + fq @ kv[..., :-1, :, :]
    if normalise:
        y = y / (weights.sum(-1, keepdim=True) + fq @ z[..., :-1, :, None] + eps)
    return y.flatten(-3, -2)[..., :n, :], LinearState(kv[..., -1, :, :], z[..., -1, :])


def step(
    state: LinearState,
    q: Float[Tensor, "*b d"],
    k: Float[Tensor, "*b d"],
    v: Float[Tensor, "*b e"],
    feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] = elu1,
    *,
    eps: float = 1e-6,
    normalise: bool = True,
) -> tuple[Float[Tensor, "*b e"], LinearState]:
    """One token of `causal_linear_attention`: its output and the state after it."""
    fq, fk = (t.squeeze(-2) for t in _features(q[..., None, :], k[..., None, :], feature_map, None))
    state = LinearState(state.kv + fk[..., :, None] * v[..., None, :], state.z + fk)
    y = (fq[..., None, :] @ state.kv).squeeze(-2)
    return y / ((fq * state.z).sum(-1, keepdim=True) + eps) if normalise else y, state


def linear_attention_reference(
    q: Float[Tensor, "*b n_q d"],
    k: Float[Tensor, "*b n_k d"],
    v: Float[Tensor, "*b n_k e"],
    feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] = elu1,
    *,
    causal: bool = False,
    mask: Bool[Tensor, "*#b n_k"] | None = None,
    eps: float = 1e-6,
    normalise: bool = True,
) -> Float[Tensor, "*b n_q e"]:
    """The dense form: every weight written out."""
    of_q, of_k = feature_map if isinstance(feature_map, tuple) else (feature_map, feature_map)
    weights = of_q(q) @ of_k(k).mT
    if causal:
        weights = weights.tril()
    if mask is not None:
        weights = weights * mask[..., None, :]
    y = weights @ v
    return y / (weights.sum(-1, keepdim=True) + eps) if normalise else y
