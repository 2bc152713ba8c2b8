"""What the programs of a config take: FLOPs, bytes, time on a chip; for `bench` and `preflight`."""
