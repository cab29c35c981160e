"""State-space duality: a linear recurrence whose state is a matrix, as products of matrices over chunks.

Source: Dao and Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
Space Duality", section 6.

`H_t = exp(a dt_t) H_(t-1) + dt_t x_t b_t^T`, `y_t = H_t c_t`, for each head a number `a < 0` and a state `p x s`; hence
`y_t = sum_(j <= t) exp(a (dt_(j+1) + ... + dt_t)) (c_t . b_j) dt_j x_j`, attention with a decay in softmax's place.

- within a chunk of q tokens the sum over j, as attention; between chunks the states, carried by one matrix of decays
- no step waits for another, so it exports; its length is then fixed, being cut into chunks
- heads of x, b and c may be fewer than those of dt: each is read by a group of them
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def ssd(
    x: Float[Tensor, "b n hx p"],
    dt: Float[Tensor, "b n h"],
    a: Float[Tensor, " h"],
    b: Float[Tensor, "b n hb s"],
    c: Float[Tensor, "b n hc s"],
    *,
    chunk: int = 64,
) -> Float[Tensor, "b n h p"]:
    """`y_t = H_t c_t` for every t, from an empty state.

    Args:
        x: inputs.
        dt: step sizes, at least 0; at 0 a token is not read.
        a: rates, at most 0.
        b, c: how inputs enter the state and how it is read.
        chunk: tokens of a chunk.

    Raises:
        ValueError: the heads of x, b or c do not divide those of dt, or a chunk of no token.
    """
    _check(x, dt, b, c)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    n, heads = int(dt.shape[1]), int(dt.shape[2])
    size = min(chunk, n)
    count = -(-n // size)
    short = count * size - n

    def chunks(t: Tensor) -> Tensor:
        # (b, n, heads, ·) to (b, heads, chunks, size, ·); what is filled up has dt = 0.
        t = F.pad(t, (0, 0, 0, 0, 0, short)) if short else t
        return t.unflatten(1, (count, size)).permute(0, 3, 1, 2, 4)

    # Sums of steps want single precision at least.
    kind = torch.promote_types(dt.dtype, torch.float32)
    read, entry = chunks(spread(c, heads)), chunks(spread(b, heads))
    value = chunks(spread(x, heads) * dt[..., None].to(x.dtype))
    sums = chunks((dt.to(kind) * a.to(kind))[..., None])[..., 0].cumsum(-1)
    scores = (read @ entry.transpose(-2, -1)) * _decays(sums).to(x.dtype)
    y = scores @ value
    if count > 1:
        whole = sums[:, :, :-1, -1]
        left = (whole[..., None] - sums[:, :, :-1]).exp().to(x.dtype)
        added = (value[:, :, :-1] * left[..., None]).transpose(-2, -1) @ entry[:, :, :-1]
        carried = _decays(whole.cumsum(-1)).to(x.dtype) @ added.flatten(-2)
        states = carried.unflatten(-1, added.shape[-2:])
        later = (read[:, :, 1:] * sums[:, :, 1:].exp().to(x.dtype)[..., None]) @ states.transpose(-2, -1)
        y = torch.cat((y[:, :, :1], y[:, :, 1:] + later), 2)
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :n]


def ssd_reference(
    x: Float[Tensor, "b n hx p"],
    dt: Float[Tensor, "b n h"],
    a: Float[Tensor, " h"],
    b: Float[Tensor, "b n hb s"],
    c: Float[Tensor, "b n hc s"],
) -> Float[Tensor, "b n h p"]:
    """`ssd`, token by token."""
    _check(x, dt, b, c)
    heads = dt.shape[2]
    state = x.new_zeros(x.shape[0], heads, x.shape[3], b.shape[3])
    rows = []
    for t in range(x.shape[1]):
        y, state = ssd_step(x[:, t], dt[:, t], a, b[:, t], c[:, t], state)
        rows.append(y)
    return torch.stack(rows, 1)


def ssd_step(
    x: Float[Tensor, "b hx p"],
    dt: Float[Tensor, "b h"],
    a: Float[Tensor, " h"],
    b: Float[Tensor, "b hb s"],
    c: Float[Tensor, "b hc s"],
    state: Float[Tensor, "b h p s"],
) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b h p s"]]:
    """One token: `y_t` and `H_t` from `H_(t-1)`."""
    heads = dt.shape[1]
    x, b, c = (spread(t, heads) for t in (x, b, c))
    state = (dt * a).exp()[..., None, None] * state + (dt[..., None] * x)[..., None] * b[..., None, :]
    return (state @ c[..., None])[..., 0], state


def spread(t: Float[Tensor, "*b g d"], heads: int) -> Float[Tensor, "*b h d"]:
    """Each of g heads `heads / g` times, one behind the other."""
    shared = heads // int(t.shape[-2])
    if shared == 1:
        return t
    # Not `repeat_interleave`, of which exporters make a loop.
    return t.unsqueeze(-2).expand(*[-1] * (t.ndim - 1), shared, -1).flatten(-3, -2)


def _decays(sums: Float[Tensor, "*b q"]) -> Float[Tensor, "*b q q"]:
    """`exp(sums_i - sums_j)` where j <= i, 0 elsewhere."""
    later = _later(int(sums.shape[-1]), sums.device)
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(later, float("-inf")).exp()


def _later(n: int, device: torch.device) -> Bool[Tensor, "n n"]:
    place = torch.arange(n, device=device)
    return place > place[:, None]


def _check(x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> None:
    for name, t in (("x", x), ("b", b), ("c", c)):
        if dt.shape[2] % t.shape[2]:
            raise ValueError(f"heads of {name} must divide those of dt; got {t.shape[2]} and {dt.shape[2]}")
