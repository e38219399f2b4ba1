"""Measuring what an attention operator costs and what it changes: `vision-attn compare` and `vision-attn bench`."""
