"""The sparse gated MLP on the CPU; nothing here is imported before its first use, since numba takes a second to
load."""
