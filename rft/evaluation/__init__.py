"""How good it is: metrics, benchmarks and baselines, scoring stored rollouts again, and the contract of a reward."""
