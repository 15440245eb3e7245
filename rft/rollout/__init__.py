"""What may happen between a sample and a rollout. Knows no framework: a tokenizer and a policy are handed in."""
