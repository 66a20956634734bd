"""The sparse gated MLP on GPUs, in Triton; imported at its first use, since Triton takes a second to load."""
