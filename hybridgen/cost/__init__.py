"""The cost of a config's programs: FLOPs, bytes and time on a chip, for `bench` and `preflight`."""
