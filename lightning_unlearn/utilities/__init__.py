"""What every other folder may use: checks of arguments, files, ranks, sharded weights."""
