"""What every part stands on: errors a user can cure, files that are whole, seeds, Ctrl-C, checkpoints."""
