"""What the commands of cli.py do, one module per group; imported when a command runs."""
