"""Functions of tensors: no parameters, no state; a plain reference beside each fast form.

- `attention`: the attention core with the hooks the systems need
- `grid`: windows, shifts, padding and mean filters on any number of grid axes
- `patterns`: which key a query may see: dense masks, FlexAttention block masks and gathered forms
- `tokens`: score, select, merge, pack and restore tokens
- `online_softmax`: partial attention states with an associative merge
- `depthwise`: depth-wise convolution with a fast weight gradient on CPU
- `linear_attention`: kernelised attention in either order of multiplication, causal or not
- `recurrence`: diagonal linear recurrences by a blocked scan
- `spectral`: circular correlation, long convolution and Toeplitz products by FFT
- `series`: trend and season by moving average, aggregation of delayed series

Nothing is imported here; import the module that is needed: `from gossamer.ops import grid`.
"""
