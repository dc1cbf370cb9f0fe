"""Secret sharing over small primes: the mathematics of the profile `shared`. See ``docs/sharing.md``."""
