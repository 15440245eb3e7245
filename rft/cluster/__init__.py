"""Many runs on what machines there are."""
