"""What a real run needs around the method: folders, processes, flags, data, reports and checkpoints."""
