"""From files to frames, seconds, positions and packs."""
