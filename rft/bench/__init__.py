"""The same work, several ways, in one run: what sharing a prompt, its vision and its prefill is worth."""
