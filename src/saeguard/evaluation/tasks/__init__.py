"""The tasks of `saeguard eval`, one file each."""
